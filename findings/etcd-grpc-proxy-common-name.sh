#!/usr/bin/env bash
# Software: etcd 3.7.3, grpc-proxy.
#
# Expected: `etcd grpc-proxy start` connects to etcd with the client certificate that other clients
# use, for example one that was issued for a user of etcd or by kubeadm.
#
# Observed: it exits if the certificate has a common name, before it connects. The reason is one line
# of plain text after lines of JSON, and does not say what to change:
#     common name: exit 1, cert has non empty Common Name (client)
#     none: serves
#
# Why it matters: kubeadm's and most scripts' client certificates have a common name, and etcd itself
# takes it for the user. Someone who compares proxies for etcd over TLS needs a certificate without
# one for this proxy alone.
set -euo pipefail

tmp=$(mktemp -d)
pids=()
cleanup() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || :; wait "$pid" 2>/dev/null || :; done
  rm -rf "$tmp"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

echo "building etcd 3.7.3" >&2
go mod init example.com/finding 2>/dev/null
go get go.etcd.io/etcd/server/v3@v3.7.3 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3

cat >main.go <<'GO'
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"time"
)

// main writes NAME.crt and NAME.key, a self-signed client certificate with the common name.
func main() {
	name, common := os.Args[1], os.Args[2]
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: common, Organization: []string{"test"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	check(err)
	check(os.WriteFile(name+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	check(err)
	check(os.WriteFile(name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), 0o600))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
GO
go build -o certificate main.go

try() { # NAME COMMON-NAME
  ./certificate "$1" "$2"
  ./etcd grpc-proxy start --endpoints https://127.0.0.1:1 --listen-addr 127.0.0.1:0 --data-dir "$1.data" \
    --cert "$1.crt" --key "$1.key" --insecure-skip-tls-verify >"$1.log" 2>&1 &
  local pid=$!
  pids+=("$pid")
  for _ in {1..100}; do
    if ! kill -0 "$pid" 2>/dev/null; then
      local code=0
      wait "$pid" || code=$?
      echo "$3: exit $code, $(grep -o 'cert has non empty Common Name (client)' "$1.log")"
      return
    fi
    if ((SECONDS - started > 8)); then break; fi
    sleep 0.1
  done
  echo "$3: serves"
}
started=$SECONDS
try named client "common name" >out
started=$SECONDS
try anonymous "" none >>out
cat out
cat >expected <<'TEXT'
common name: exit 1, cert has non empty Common Name (client)
none: serves
TEXT
if cmp -s out expected; then
  echo "still so: grpc-proxy refuses a client certificate with a common name"
  exit 0
fi
echo "changed: grpc-proxy answers otherwise"
exit 1

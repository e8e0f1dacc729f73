#!/usr/bin/env bash
# Software: etcd 3.7.3 over TLS.
#
# Expected: etcd speaks HTTP/2 and HTTP/1.1 over TLS (the JSON gateway, /health, /metrics), so it
# selects either in ALPN. A client whose protocols it does not know gets the alert
# no_application_protocol.
#
# Observed: etcd offers h2 alone. A client that offers http/1.1 alone gets no protocol, and yet
# HTTP/1.1 works, whereas http/1.0 is refused. A client that offers no ALPN at all can use HTTP/1.1
# but not HTTP/2, so gRPC does not work for it:
#     [h2] selected "h2"
#     [http/1.1] selected "", answer HTTP/1.1 200 OK
#     [http/1.0] refused: remote error: tls: no application protocol
#     [] selected "", answer HTTP/1.1 200 OK
#
# Why it matters: load balancers, proxies and probes that decide by the selected protocol treat such
# a connection as unknown TCP, or report that etcd does not support HTTP/1.1. A proxy in front of
# etcd that lists http/1.1 among its protocols answers differently from etcd.
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

# start_etcd BINARY NAME FLAG… starts an etcd on a free port of loopback and sets address.
start_etcd() {
  local binary=$1 name=$2 scheme=${scheme:-http}
  shift 2
  : >"$name.log"
  "./$binary" --name "$name" --data-dir "$name.data" --listen-client-urls "$scheme://127.0.0.1:0" \
    --advertise-client-urls "$scheme://127.0.0.1:0" --listen-peer-urls http://127.0.0.1:0 \
    --initial-advertise-peer-urls http://127.0.0.1:0 --initial-cluster "$name=http://127.0.0.1:0" \
    "$@" >"$name.log" 2>&1 &
  pids+=($!)
  for _ in {1..300}; do
    address=$(sed -n 's/.*"serving client traffic.*"address":"\([^"]*\)".*/\1/p' "$name.log" | head -n 1)
    [[ -z $address ]] || return 0
    sleep 0.1
  done
  echo "etcd did not start:"
  tail -n 5 "$name.log"
  exit 1
}

echo "building etcd 3.7.3" >&2
go mod init example.com/finding 2>/dev/null
go get go.etcd.io/etcd/server/v3@v3.7.3 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3

cat >main.go <<'GO'
package main

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"os"
	"strings"
	"time"
)

func main() {
	for _, offered := range [][]string{{"h2"}, {"http/1.1"}, {"http/1.0"}, {}} {
		c, err := tls.Dial("tcp", os.Args[1], &tls.Config{InsecureSkipVerify: true, NextProtos: offered})
		if err != nil {
			fmt.Println(offered, "refused:", err)
			continue
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		selected := c.ConnectionState().NegotiatedProtocol
		fmt.Printf("%v selected %q", offered, selected)
		if selected != "h2" {
			fmt.Fprint(c, "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
			answer, err := bufio.NewReader(c).ReadString('\n')
			if err != nil {
				answer = err.Error()
			}
			fmt.Print(", answer ", strings.TrimSpace(answer))
		}
		fmt.Println()
		c.Close()
	}
}
GO
go build -o client .

scheme=https start_etcd etcd secure --auto-tls
./client "$address" | tee out
cat >expected <<'TEXT'
[h2] selected "h2"
[http/1.1] selected "", answer HTTP/1.1 200 OK
[http/1.0] refused: remote error: tls: no application protocol
[] selected "", answer HTTP/1.1 200 OK
TEXT
if cmp -s out expected; then
  echo "still so: etcd serves HTTP/1.1 over TLS and does not select it in ALPN"
  exit 0
fi
echo "changed: etcd selects other protocols, or answers otherwise"
exit 1

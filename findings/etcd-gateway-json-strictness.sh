#!/usr/bin/env bash
# Software: the JSON gateway of etcd 3.5.35 and etcd 3.7.3.
#
# Expected: a newer etcd reads the same JSON, or is stricter than the older one, or more lenient.
#
# Observed: each refuses (400) what the other accepts (200), since 3.6 reads JSON with another
# library. "ASCENDD" is not a sort order; 3.7 takes it for the default, NONE.
#     request                                      3.5.35  3.7.3
#     {"key":"Zm9v","sort_order":"ASCENDD"}        400     200
#     {"key":"Zm9vYmE"}                            400     200
#     {"key":"Zm9v","limit":1.0}                   400     200
#     {"key":"Zm9vYm\nE="}                         200     400
#     {"key":"Zm9v","key":"Zm9v"}                  200     400
#
# Why it matters: clients of the gateway that worked may fail after an upgrade, and a
# misspelled request that failed before now succeeds. A proxy with its own gateway behaves like one
# of them, whichever etcd it is in front of.
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

# build VERSION BINARY PACKAGE… builds commands of etcd from their modules.
build() {
  local version=$1 binary=$2
  shift 2
  echo "building etcd $version" >&2
  mkdir "build-$binary"
  (
    cd "build-$binary"
    go mod init example.com/finding 2>/dev/null
    go get "${@/%/@$version}" 2>go.log || { cat go.log; exit 1; }
    for package; do
      name=$binary
      [[ $package != */etcdctl/* ]] || name=etcdctl
      go build -trimpath -ldflags "-s -w" -o "../$name" "$package"
    done
  )
}

# The gateway of etcd connects to the port of the flag, so that port 0 does not work.
mkdir port
cat >port/main.go <<'GO'
package main

import (
	"fmt"
	"net"
)

func main() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(l.Addr())
}
GO

requests=(
  '{"key":"Zm9v","sort_order":"ASCENDD"}'
  '{"key":"Zm9vYmE"}'
  '{"key":"Zm9v","limit":1.0}'
  '{"key":"Zm9vYm\nE="}'
  '{"key":"Zm9v","key":"Zm9v"}'
)
declare -A codes
for version in v3.5.35 v3.7.3; do
  build "$version" "etcd-$version" go.etcd.io/etcd/server/v3
  port=$(go run port/main.go)
  start_etcd "etcd-$version" "$version" --listen-client-urls "http://$port" --advertise-client-urls "http://$port"
  for request in "${requests[@]}"; do
    codes[$version$request]=$(curl --noproxy '*' -sS -o answer -w '%{http_code}' -d "$request" "http://$address/v3/kv/range")
  done
done

got=
printf '%-44s %-7s %s\n' request 3.5.35 3.7.3
for request in "${requests[@]}"; do
  printf '%-44s %-7s %s\n' "$request" "${codes[v3.5.35$request]}" "${codes[v3.7.3$request]}"
  got+="${codes[v3.5.35$request]}-${codes[v3.7.3$request]} "
done
if [[ $got == "400-200 400-200 400-200 200-400 200-400 " ]]; then
  echo "still so: either gateway refuses what the other one accepts"
  exit 0
fi
echo "changed: the gateways of 3.5.35 and 3.7.3 do not differ as they did"
exit 1

#!/usr/bin/env bash
# Software: etcd 3.7.3 with --listen-client-http-urls, without TLS.
#
# Expected: the client port, which then serves gRPC alone, refuses an HTTP/1.1 request with an HTTP
# response, or closes the connection.
#
# Observed: etcd sends an HTTP/2 SETTINGS frame. The first bytes of the response to
# "GET /health HTTP/1.1", with the flag and without it:
#     with: 00 00 06 04 00 00 00 00 00 00 05 00 00 40 00
#     without: HTTP/1.1 200 OK
#
# Why it matters: probes, and proxies that pass /health or /metrics to etcd's client URL over
# HTTP/1.1, fail with "malformed HTTP response" or "HTTP/0.9 not allowed" instead of a status. Neither
# text mentions the flag that causes it. They must use the other URLs.
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

# ask writes the first bytes of the response to an HTTP/1.1 request to the file answer.
ask() {
  exec 3<>"/dev/tcp/${address%:*}/${address##*:}"
  printf 'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
  timeout 10 head -c 15 <&3 >answer || :
  exec 3>&-
}

# The log contains both ports. This is the one that serves gRPC.
start_etcd etcd split --listen-client-http-urls http://localhost:0
for _ in {1..100}; do
  address=$(sed -n 's/.*"serving client traffic.*"traffic":"grpc","address":"\([^"]*\)".*/\1/p' split.log)
  [[ -z $address ]] || break
  sleep 0.1
done
[[ -n $address ]] || { echo "changed: no port serves gRPC alone"; exit 1; }
ask
with=$(od -An -tx1 answer | sed 's/^ *//')
start_etcd etcd plain
ask
without=$(cat answer)
echo "with: $with"
echo "without: $without"
# Type 4 of stream 0 is SETTINGS.
if [[ $with =~ ^00\ 00\ [0-9a-f]{2}\ 04\ 00\ 00\ 00\ 00\ 00 && $without == "HTTP/1.1 200 OK" ]]; then
  echo "still so: the answer to HTTP/1.1 is a frame of HTTP/2"
  exit 0
fi
echo "changed: the client port answers otherwise"
exit 1

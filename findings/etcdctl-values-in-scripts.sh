#!/usr/bin/env bash
# Software: etcdctl 3.7.3 with etcd 3.7.3.
#
# Expected: a shell script that gets a value from etcdctl gets the bytes of the value.
#
# Observed: no plain output is exact.
#     stored                       secret (6 bytes)
#     get --print-value-only | put 7 bytes, then 8: each copy adds a line feed
#     watch -- COMMAND             ETCD_WATCH_VALUE is "secret" (8 bytes): a Go string literal
#     get -w json                  c2VjcmV0: base64 of the 6 bytes
#
# Why it matters: a script that copies, backs up or rotates a value this way stores another one. A
# password with a line feed at its end is refused, and the value looks the same in a terminal. Scripts
# should use -w json, whose values are base64.
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

echo "building etcd and etcdctl 3.7.3" >&2
go mod init example.com/finding 2>/dev/null
go get go.etcd.io/etcd/server/v3@v3.7.3 go.etcd.io/etcd/etcdctl/v3@v3.7.3 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3
go build -trimpath -ldflags "-s -w" -o etcdctl go.etcd.io/etcd/etcdctl/v3

./etcd --data-dir data --listen-client-urls "unix://$tmp/client" --advertise-client-urls "unix://$tmp/client" \
  --listen-peer-urls http://127.0.0.1:0 --initial-advertise-peer-urls http://127.0.0.1:0 \
  --initial-cluster default=http://127.0.0.1:0 >etcd.log 2>&1 &
pids+=($!)
for _ in {1..600}; do
  [[ -S client ]] && break
  sleep 0.1
done
ctl() { ./etcdctl --endpoints "unix://$tmp/client" --command-timeout 60s "$@"; }
bytes() { wc -c | tr -d ' '; }

printf secret | ctl put key >/dev/null
printf '%s\n' "$(ctl get key -w json | sed 's/.*"value":"\([^"]*\)".*/\1/')" >base64
sizes=
for _ in 1 2; do
  ctl get key --print-value-only >copy
  ctl put key <copy >/dev/null
  sizes+="$(ctl get key -w json | sed 's/.*"value":"\([^"]*\)".*/\1/' | base64 -d | bytes) "
done

# The command writes what it got, and the watch ends with it.
ctl watch key --rev 1 -- sh -c 'printf %s "$ETCD_WATCH_VALUE" >watched; mv watched seen' >watch.log 2>&1 &
pids+=($!)
for _ in {1..600}; do
  [[ -f seen ]] && break
  sleep 0.1
done
watched=$(head -c 7 seen)
echo "get -w json: $(cat base64); get and put: $sizes; watch: $watched…"
if [[ $(cat base64) == c2VjcmV0 && $sizes == "7 8 " && $watched == '"secret' ]]; then
  echo "still so: only the JSON output has the exact bytes"
  exit 0
fi
echo "changed: etcdctl writes values otherwise"
exit 1

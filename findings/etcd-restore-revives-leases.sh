#!/usr/bin/env bash
# Software: etcd, etcdctl and etcdutl 3.7.3: a lease across a restore.
#
# Expected: a lease that expired after a snapshot was taken is expired in a cluster that is restored
# from it later, or has what was left of its time when the snapshot was taken.
#
# Observed: it is there again with its whole time to live, however old the snapshot is, and so are
# its keys. With a lease of 10 s, and a snapshot 4 s after it was granted:
#     in the snapshot: 4 to 6 s of 10 s are left
#     11 s later: the key is gone
#     restored: the key is there, and 8 to 10 s of 10 s are left
#
# Why it matters: locks, leader elections and announcements come back with the data, for processes
# that ended long ago, and hold everybody else up for a whole TTL after a restore. A tool that
# starts a copy of a cluster, as a test of a backup does, must not act on its leases either.
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
go get go.etcd.io/etcd/server/v3@v3.7.3 go.etcd.io/etcd/etcdctl/v3@v3.7.3 go.etcd.io/etcd/etcdutl/v3@v3.7.3 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3
go build -trimpath -ldflags "-s -w" -o etcdctl.bin go.etcd.io/etcd/etcdctl/v3
go build -trimpath -ldflags "-s -w" -o etcdutl go.etcd.io/etcd/etcdutl/v3

# unix sockets in the temporary folder: the part behind the colon belongs to the name of the file
etcdctl() { timeout 30 ./etcdctl.bin --endpoints "unix://$tmp/client.sock:0" "$@"; }

# start DATA starts an etcd and waits until it responds.
start() {
  ./etcd --data-dir "$1" --listen-client-urls unix://client.sock:0 --advertise-client-urls http://127.0.0.1:1 \
    --listen-peer-urls unix://peer.sock:0 >>etcd.log 2>&1 &
  pid=$!
  pids+=("$pid")
  for _ in {1..100}; do
    ! timeout 5 ./etcdctl.bin --endpoints "unix://$tmp/client.sock:0" get x >/dev/null 2>&1 || return 0
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  echo "etcd did not start:"; tail -n 3 etcd.log; exit 1
}
stop() { kill "$pid"; wait "$pid" || :; }
left() { etcdctl lease timetolive "$1" | sed -n 's/.*remaining(\([-0-9]*\)s).*/\1/p'; }

start first
lease=$(etcdctl lease grant 10 | cut -d' ' -f2)
etcdctl put lock holder --lease="$lease" >/dev/null
sleep 4
early=$(left "$lease")
etcdctl snapshot save snapshot.db >save.log 2>&1 || { cat save.log; exit 1; }
echo "in the snapshot: $early s of 10 s are left"
sleep 11
gone=$(etcdctl get --print-value-only lock)
echo "11 s later: the key is ${gone:-gone}"
stop
./etcdutl snapshot restore snapshot.db --data-dir second >restore.log 2>&1 || { cat restore.log; exit 1; }
start second
late=$(left "$lease")
again=$(etcdctl get --print-value-only lock)
echo "restored: the key is ${again:-gone}, and $late s of 10 s are left"
if [[ -z $gone && $again == holder ]] && ((early <= 6 && late > early)); then
  echo "still so: a restore gives an expired lease its whole time to live again"
  exit 0
fi
echo "changed: the lease is not there again, or not with its whole time"
exit 1

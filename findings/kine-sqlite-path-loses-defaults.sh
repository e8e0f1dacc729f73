#!/usr/bin/env bash
# Software: kine v0.17.5 with SQLite.
#
# Expected: --endpoint sqlite://PATH moves the database and keeps the other defaults, among them the
# journal mode WAL, which kine's documentation lists as the default of its parameter.
#
# Observed: the defaults belong to the default endpoint as a whole. An endpoint with a path alone
# has none of them: SQLite's rollback journal, no busy timeout, other transaction locks. The journal
# mode shows in the header of the database (2 is WAL, 1 is the rollback journal):
#     no endpoint: 2
#     sqlite://PATH: 1
#     sqlite://PATH?_journal_mode=WAL: 2
#
# Why it matters: a kine whose data was only moved to another folder blocks readers while it writes,
# and its log does not mention it. A test of an etcd proxy against such a kine fails although the
# proxy is correct. With a path, specify all parameters.
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

echo "building kine v0.17.5 (some minutes the first time)" >&2
go mod init example.com/finding 2>/dev/null
go get github.com/k3s-io/kine@v0.17.5 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o kine github.com/k3s-io/kine

# mode DATABASE FLAG… starts kine and prints the read version in the header of its database.
mode() {
  local database=$1 pid
  shift
  : >kine.log
  ./kine --listen-address tcp://127.0.0.1:0 --metrics-bind-address 0 "$@" >kine.log 2>&1 &
  pid=$!
  pids+=("$pid")
  for _ in {1..300}; do
    ! grep -q 'Kine available at' kine.log || break
    sleep 0.1
  done
  grep -q 'Kine available at' kine.log || { echo "kine did not start:"; tail -n 5 kine.log; exit 1; }
  kill "$pid"
  wait "$pid" || :
  mode=$(od -An -tu1 -j19 -N1 "$database" | tr -d ' ')
}

mode db/state.db
none=$mode
mkdir path wal
mode path/state.db --endpoint "sqlite://$tmp/path/state.db"
path=$mode
mode wal/state.db --endpoint "sqlite://$tmp/wal/state.db?_journal_mode=WAL"
wal=$mode
echo "no endpoint: $none"
echo "sqlite://PATH: $path"
echo "sqlite://PATH?_journal_mode=WAL: $wal"
if [[ $none$path$wal == 212 ]]; then
  echo "still so: an endpoint with a path alone loses the defaults"
  exit 0
fi
echo "changed: the journal mode is another one"
exit 1

#!/usr/bin/env bash
# Software: etcdctl 3.7.3 (3.5 and 3.6 do the same).
#
# Expected: a flag takes precedence over the environment variable of the same setting, as in most
# command-line tools.
#
# Observed: etcdctl exits with code 1 and a fatal log entry before it connects, even when both have
# the same value:
#     ETCDCTL_ENDPOINTS=http://127.0.0.1:1 etcdctl --endpoints=http://127.0.0.1:1 get key
#     "msg":"conflicting environment variable is shadowed by corresponding command-line flag ..."
#
# Why it matters: on a host where ETCDCTL_ENDPOINTS names etcd, or a proxy, `etcdctl --endpoints=...`
# for the other one does not work. Unset the variable for that command.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

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

build v3.7.3 etcd go.etcd.io/etcd/etcdctl/v3
# Nothing listens there: with either alone, etcdctl would try to connect until its timeout.
endpoint=http://127.0.0.1:1
status=0
ETCDCTL_ENDPOINTS=$endpoint ./etcdctl --endpoints="$endpoint" --command-timeout=2s get key >out 2>&1 || status=$?
alone=0
./etcdctl --endpoints="$endpoint" --command-timeout=2s get key >alone 2>&1 || alone=$?
grep -o '"msg":"[^"]*"' out || cat out
echo "exit code $status with both, $alone with the flag alone"
if ((status == 1)) && grep -q 'conflicting environment variable' out && ! grep -q 'conflicting environment variable' alone; then
  echo "still so: etcdctl refuses a flag whose environment variable is set, even to the same value"
  exit 0
fi
echo "changed: etcdctl accepts a flag whose environment variable is set"
exit 1

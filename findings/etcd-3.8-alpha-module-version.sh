#!/usr/bin/env bash
# Software: etcd v3.8.0-alpha.0 as Go modules (go.etcd.io/etcd/server/v3).
#
# Expected: a build of the module server/v3 at v3.8.0-alpha.0 is etcd 3.8.0-alpha.0 and says so.
#
# Observed: server/v3 v3.8.0-alpha.0 requires api, client and pkg at v3.7.0-beta.0, although these
# modules have a v3.8.0-alpha.0 of their own. A plain build links the old ones, with the old version
# number and the old messages:
#     server/v3 v3.8.0-alpha.0 with api/v3 v3.7.0-beta.0
#     etcd Version: 3.7.0-beta.0
#
# Why it matters: a proxy that is tested against such a build is tested with messages and clients of
# 3.7. Require all modules of etcd at the same version.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

version=v3.8.0-alpha.0
echo "building etcd $version" >&2
go mod init example.com/finding 2>/dev/null
go get "go.etcd.io/etcd/server/v3@$version" 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3
# The module of the same version exists.
[[ $(go list -m "go.etcd.io/etcd/api/v3@$version") == "go.etcd.io/etcd/api/v3 $version" ]]

api=$(go list -m -f '{{.Version}}' go.etcd.io/etcd/api/v3)
says=$(./etcd --version | head -n 1)
echo "server/v3 $version with api/v3 $api"
echo "$says"
if [[ $api == v3.7.0-beta.0 && $says == "etcd Version: 3.7.0-beta.0" ]]; then
  echo "still so: a build of server/v3 $version calls itself 3.7.0-beta.0"
  exit 0
fi
echo "changed: a build of server/v3 $version has another api module or version"
exit 1

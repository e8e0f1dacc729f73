#!/usr/bin/env bash
# Software: etcd 3.5.35, 3.6.16 and 3.7.3: URLs of unix sockets.
#
# Expected: --listen-client-urls unix:///run/etcd/client.sock listens on that file, as such URLs do
# everywhere else, and the same URL can be advertised.
#
# Observed: etcd listens on it, and before 3.7 it refuses to advertise it, since the URL has no port.
# In a URL with a port, it takes host and port together as a file name relative to its working
# directory, with the colon in it, and every version advertises that:
#     3.5.35: listens on unix:///…/client.sock: client.sock; advertised too: refused; unix://client.sock:0: client.sock:0
#     3.6.16: listens on unix:///…/client.sock: client.sock; advertised too: refused; unix://client.sock:0: client.sock:0
#     3.7.3: listens on unix:///…/client.sock: client.sock; advertised too: client.sock; unix://client.sock:0: client.sock:0
#
# Why it matters: a tool that starts an etcd which nobody else on the machine may reach needs a unix
# socket. The one form that every version takes is a file name with a port in it, in the working
# directory, which clients cannot reach by the advertised URL. (etcd 3.4 takes no other form at all.)
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

# listens VERSION FLAG… starts etcd in a new folder and waits until it listens on a socket there, or
# ends. It prints the name of the socket, or refuses.
listens() {
  local version=$1 folder found=
  shift
  folder=$(mktemp -d "$tmp/run-XXXX")
  (cd "$folder" && exec "$tmp/etcd-$version" --data-dir data --listen-peer-urls unix://peer.sock:0 "${@//DIR/$folder}" >log 2>&1) &
  local pid=$!
  pids+=("$pid")
  for _ in {1..300}; do
    found=$(cd "$folder" && for f in client*; do [[ ! -S $f ]] || echo "$f"; done)
    [[ -z $found ]] && kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  kill "$pid" 2>/dev/null || :
  wait "$pid" 2>/dev/null || :
  if [[ -z $found ]]; then
    grep -q 'host:port' "$folder/log" || { tail -n 3 "$folder/log" >&2; return 1; }
  fi
  echo "$found"
}

for version in 3.5.35 3.6.16 3.7.3; do
  echo "building etcd $version" >&2
  mkdir "build-$version"
  (
    cd "build-$version"
    go mod init example.com/finding 2>/dev/null
    go get "go.etcd.io/etcd/server/v3@v$version" 2>go.log || { cat go.log; exit 1; }
    go build -trimpath -ldflags "-s -w" -o "../etcd-$version" go.etcd.io/etcd/server/v3
  )
  absolute=$(listens "$version" --listen-client-urls unix://DIR/client.sock --advertise-client-urls http://127.0.0.1:1)
  advertised=$(listens "$version" --listen-client-urls unix://DIR/client.sock --advertise-client-urls unix://DIR/client.sock)
  relative=$(listens "$version" --listen-client-urls unix://client.sock:0 --advertise-client-urls unix://client.sock:0)
  echo "$version: listens on unix:///…/client.sock: ${absolute:-refused}; advertised too: ${advertised:-refused}; unix://client.sock:0: ${relative:-refused}"
done | tee out
cat >expected <<'TEXT'
3.5.35: listens on unix:///…/client.sock: client.sock; advertised too: refused; unix://client.sock:0: client.sock:0
3.6.16: listens on unix:///…/client.sock: client.sock; advertised too: refused; unix://client.sock:0: client.sock:0
3.7.3: listens on unix:///…/client.sock: client.sock; advertised too: client.sock; unix://client.sock:0: client.sock:0
TEXT
if cmp -s out expected; then
  echo "still so: before 3.7, a unix socket needs a port to be advertised, which is a part of its name"
  exit 0
fi
echo "changed: etcd takes other URLs of unix sockets than before"
exit 1

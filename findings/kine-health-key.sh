#!/usr/bin/env bash
# Software: kine v0.17.5 on a new SQLite database.
#
# Expected: an etcd without clients is empty, as etcd itself is: revision 1 and no keys.
#
# Observed: kine writes two keys of its own at start. One of them is under /registry, the prefix of
# Kubernetes' data:
#     revision 2
#     compact_rev_key (created at revision 1) = ""
#     /registry/health (created at revision 2) = "{\"health\":\"true\"}"
#
# Why it matters: kine writes to its database and not through its own API, so a proxy in front of
# kine never sees this write. A rule that requires every value under /registry/ to be encrypted
# finds one that is not, and kube-apiserver reads that key in its health check. Clients that count
# on revision 1 or on no keys, such as a restore into an empty etcd, are surprised as well.
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
go get github.com/k3s-io/kine@v0.17.5 go.etcd.io/etcd/api/v3@v3.7.3 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o kine github.com/k3s-io/kine
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"os"
	"sort"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func main() {
	conn, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	all, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}, grpc.WaitForReady(true))
	check(err)
	sort.Slice(all.Kvs, func(i, j int) bool { return all.Kvs[i].CreateRevision < all.Kvs[j].CreateRevision })
	fmt.Println("revision", all.Header.Revision)
	for _, pair := range all.Kvs {
		fmt.Printf("%s (created at revision %d) = %q\n", pair.Key, pair.CreateRevision, pair.Value)
	}
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go build -o client .

: >kine.log
./kine --endpoint "sqlite://$tmp/state.db?_journal_mode=WAL&_busy_timeout=30000" --listen-address tcp://127.0.0.1:0 --metrics-bind-address 0 >kine.log 2>&1 &
pids+=($!)
address=
for _ in {1..300}; do
  address=$(sed -n 's|.*Kine available at http://\([0-9.:]*\).*|\1|p' kine.log)
  [[ -z $address ]] || break
  sleep 0.1
done
[[ -n $address ]] || { echo "kine did not start:"; tail -n 5 kine.log; exit 1; }

./client "$address" | tee out
if grep -q '^/registry/health ' out; then
  echo "still so: a new kine has a key /registry/health that no client wrote"
  exit 0
fi
echo "changed: a new kine has no key /registry/health"
exit 1

#!/usr/bin/env bash
# Software: etcd 3.7.3, KV.RangeStream with sort_target VALUE and sort_order NONE.
#
# Expected: RangeStream either refuses a sort, as it does for every request with an order
# (Unimplemented, "RangeStream does not support custom sort orders"), or it returns each key once,
# as the same Range request does.
#
# Observed: a sort target without an order passes that check. etcd then sorts each chunk separately,
# cuts it to its size, and starts the next chunk after the last key of the sorted one. Keys that
# sorted behind the cut are lost, and keys after the last one are sent again. For 100 keys:
#     Range: 100 keys, RangeStream: 115 keys, 98 different ones
#
# Why it matters: a client that uses RangeStream with a target, which looks harmless without an
# order, silently loses keys. A proxy that passes requests on must keep or refuse this; if the proxy
# changes values (for example because it encrypts them), other keys are lost.
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
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func main() {
	conn, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	kv := pb.NewKVClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	const n = 100
	for i := range n {
		key, value := fmt.Sprintf("key%03d", i), fmt.Sprintf("value%03d", i*37%n)
		_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)}, grpc.WaitForReady(true))
		check(err)
	}
	request := &pb.RangeRequest{Key: []byte("key"), RangeEnd: []byte("kez"), SortTarget: pb.RangeRequest_VALUE}
	whole, err := kv.Range(ctx, request)
	check(err)
	stream, err := kv.RangeStream(ctx, request)
	check(err)
	returned, different := 0, map[string]bool{}
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		check(err)
		for _, pair := range chunk.RangeResponse.Kvs {
			returned++
			different[string(pair.Key)] = true
		}
	}
	fmt.Printf("Range: %d keys, RangeStream: %d keys, %d different ones\n", len(whole.Kvs), returned, len(different))
	if len(different) < n || returned > n {
		os.Exit(10)
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

start_etcd etcd default
status=0
./client "$address" || status=$?
if ((status == 10)); then
  echo "still so: RangeStream with target VALUE and no order loses and repeats keys"
  exit 0
fi
echo "changed: RangeStream with target VALUE and no order refuses the request or returns each key once"
exit 1

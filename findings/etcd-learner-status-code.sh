#!/usr/bin/env bash
# Software: etcd 3.5.35, 3.6.16 and 3.7.3 with a learner.
#
# Expected: a learner refuses a request that it does not serve with the same gRPC status in each
# release, since the error text is the same.
#
# Observed: for a linearizable Range,
#     3.5.35: Unavailable, etcdserver: rpc not supported for learner
#     3.6.16: FailedPrecondition, etcdserver: rpc not supported for learner
#     3.7.3: FailedPrecondition, etcdserver: rpc not supported for learner
#
# Why it matters: many clients and proxies treat Unavailable as "try another endpoint" and
# FailedPrecondition as final. With a learner among the endpoints, a request that was retried at
# another endpoint with 3.5 fails after an upgrade to 3.6. A proxy must recognize the text, or avoid
# learners.
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

mkdir client
cd client
go mod init example.com/finding 2>/dev/null
go get go.etcd.io/etcd/client/v3@v3.7.3 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
// With no argument it prints four free addresses of loopback. Otherwise its arguments are the
// client URLs of a member and of a learner to be, and the peer URL of the learner: "add" adds it,
// "ask" waits until it runs and prints what it says to a Range.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

func main() {
	if len(os.Args) == 1 {
		for range 4 {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			check(err)
			defer l.Close()
			fmt.Println(l.Addr())
		}
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := grpc.NewClient(os.Args[2], grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	if os.Args[1] == "add" {
		// A new cluster refuses members for some seconds.
		for {
			_, err = pb.NewClusterClient(conn).MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{os.Args[3]}, IsLearner: true}, grpc.WaitForReady(true))
			if err == nil || ctx.Err() != nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		check(err)
		return
	}
	for {
		s, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{}, grpc.WaitForReady(true))
		check(err)
		if s.IsLearner && s.Leader != 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	_, err = pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("key")})
	fmt.Printf("%s, %s\n", status.Code(err), status.Convert(err).Message())
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go build -o ../ask .
cd ..

got=
for version in v3.5.35 v3.6.16 v3.7.3; do
  build "$version" "etcd-$version" go.etcd.io/etcd/server/v3
  mapfile -t free < <(./ask)
  flags=(--listen-client-urls "http://${free[0]}" --advertise-client-urls "http://${free[0]}")
  "./etcd-$version" --name member --data-dir "$version.member" "${flags[@]}" \
    --listen-peer-urls "http://${free[1]}" --initial-advertise-peer-urls "http://${free[1]}" \
    --initial-cluster "member=http://${free[1]}" >member.log 2>&1 &
  pids+=($!)
  ./ask add "${free[0]}" "http://${free[3]}"
  flags=(--listen-client-urls "http://${free[2]}" --advertise-client-urls "http://${free[2]}")
  "./etcd-$version" --name learner --data-dir "$version.learner" "${flags[@]}" \
    --listen-peer-urls "http://${free[3]}" --initial-advertise-peer-urls "http://${free[3]}" \
    --initial-cluster "member=http://${free[1]},learner=http://${free[3]}" --initial-cluster-state existing >learner.log 2>&1 &
  pids+=($!)
  answer=$(./ask ask "${free[2]}")
  echo "${version#v}: $answer"
  got+="$answer;"
done
text="etcdserver: rpc not supported for learner"
if [[ $got == "Unavailable, $text;FailedPrecondition, $text;FailedPrecondition, $text;" ]]; then
  echo "still so: a learner refuses with Unavailable in 3.5 and FailedPrecondition since 3.6"
  exit 0
fi
echo "changed: a learner's refusal has other codes or another text"
exit 1

#!/usr/bin/env bash
# Software: etcd 3.7.3; 3.5.35 does the same.
#
# Expected: a lease of 60 seconds that its owner does not keep alive ends 60 seconds after it was
# granted, or a few seconds later.
#
# Observed: each change of the leader gives every lease its whole time again, although nobody kept
# it alive:
#     after 15 s without a keep-alive: less than 46 s left
#     after the leader was moved: more than 58 s left
#
# Why it matters: locks, elections and announcements of a process that crashed last longer, by the
# whole time of the lease for each restart or move of the leader, and for as long as these are more
# frequent than the time of the lease. A rolling upgrade of etcd is enough. A program that waits for
# the end of a lease can wait for longer than its time to live.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

echo "building etcd 3.7.3" >&2
go mod init example.com/finding 2>/dev/null
go get go.etcd.io/etcd/server/v3@v3.7.3 go.etcd.io/etcd/client/v3@v3.7.3 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3

cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	urls, _ := cluster("", "", "")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	c := connect(urls[0])
	lease, err := c.Grant(ctx, 60)
	check(err)
	time.Sleep(15 * time.Second)
	left := func() int64 {
		r, err := c.TimeToLive(ctx, lease.ID)
		check(err)
		return r.TTL
	}
	if n := left(); n < 46 {
		fmt.Println("after 15 s without a keep-alive: less than 46 s left")
	} else {
		fmt.Printf("after 15 s without a keep-alive: %d s left\n", n)
	}
	status, err := c.Status(ctx, urls[0])
	check(err)
	list, err := c.MemberList(ctx)
	check(err)
	var leader, other uint64 = status.Leader, 0
	var at string
	for _, m := range list.Members {
		if m.ID == leader {
			at = m.ClientURLs[0]
		} else {
			other = m.ID
		}
	}
	_, err = connect(at).MoveLeader(ctx, other)
	check(err)
	var n int64
	for range 20 { // the new leader needs a moment
		if n = left(); n > 58 {
			fmt.Println("after the leader was moved: more than 58 s left")
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	fmt.Printf("after the leader was moved: %d s left\n", n)
}

// cluster starts etcds with the further flags given for each, and returns their URLs and processes.
func cluster(flags ...string) (urls []string, etcds []*exec.Cmd) {
	var peers, initial []string
	for n := range flags {
		urls, peers = append(urls, free()), append(peers, free())
		initial = append(initial, fmt.Sprintf("m%d=%s", n, peers[n]))
	}
	for n, flag := range flags {
		args := []string{"--name", fmt.Sprintf("m%d", n), "--data-dir", fmt.Sprintf("data-%d", n), "--unsafe-no-fsync", "--log-level", "error",
			"--listen-client-urls", urls[n], "--advertise-client-urls", urls[n], "--listen-peer-urls", peers[n], "--initial-advertise-peer-urls", peers[n],
			"--initial-cluster", strings.Join(initial, ",")}
		etcd := exec.Command("./etcd", append(args, strings.Fields(flag)...)...)
		etcd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		check(etcd.Start())
		etcds = append(etcds, etcd)
	}
	return urls, etcds
}

func free() string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	defer l.Close()
	return "http://" + l.Addr().String()
}

func connect(url string) *clientv3.Client {
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, DialTimeout: time.Minute, Logger: zap.NewNop()})
	check(err)
	return c
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
GO
go get go.uber.org/zap@v1.27.1 2>go.log || { cat go.log; exit 1; }
go build -o finding main.go

./finding | tee out
cat >expected <<'TEXT'
after 15 s without a keep-alive: less than 46 s left
after the leader was moved: more than 58 s left
TEXT
if cmp -s out expected; then
  echo "still so: a change of the leader gives every lease its whole time again"
  exit 0
fi
echo "changed: a lease keeps its age when the leader changes"
exit 1

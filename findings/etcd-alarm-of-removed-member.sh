#!/usr/bin/env bash
# Software: etcd 3.7.3; 3.5.35 does the same.
#
# Expected: a cluster of three whose only full member is removed accepts writes again: neither of the
# members that are left is full.
#
# Observed: the NOSPACE alarm names the removed member and stays. Every put is refused until the
# alarm is disarmed, while /livez and /readyz of each member say that all is well:
#     a member is full: put: etcdserver: mvcc: database space exceeded
#     it is removed: members 2, alarms of members that exist 0, alarms of others 1
#     put: etcdserver: mvcc: database space exceeded
#     /health 503, /livez 200, /readyz 200
#     after etcdctl alarm disarm: put: ok
#
# Why it matters: replacing the member with the full disk is the obvious repair, and does not end
# the outage. A proxy or balancer that watches /readyz sends writes to a cluster that refuses them
# all, and leases too. Only /health and `etcdctl alarm list` show why.
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
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	urls, _ := cluster("", "", "--quota-backend-bytes 200000")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	c, small := connect(urls[0]), connect(urls[2])
	put := func(c *clientv3.Client, n int) error {
		_, err := c.Put(ctx, fmt.Sprint("key", n), strings.Repeat("x", n))
		return err
	}
	for n := 60000; put(small, n) == nil; n++ {
	}
	for put(c, 1) == nil { // until the alarm has reached this member
		time.Sleep(100 * time.Millisecond)
	}
	fmt.Println("a member is full: put:", put(c, 1))

	id := uint64(0)
	list, err := c.MemberList(ctx)
	check(err)
	for _, m := range list.Members {
		if m.Name == "m2" {
			id = m.ID
		}
	}
	for {
		if _, err = c.MemberRemove(ctx, id); err == nil {
			break
		}
		if ctx.Err() != nil {
			check(err)
		}
		time.Sleep(time.Second) // etcd refuses until it has seen all members healthy for a while
	}
	list, err = c.MemberList(ctx)
	check(err)
	alarms, err := c.AlarmList(ctx)
	check(err)
	present, absent := 0, 0
	for _, a := range alarms.Alarms {
		found := false
		for _, m := range list.Members {
			found = found || m.ID == a.MemberID
		}
		if found {
			present++
		} else {
			absent++
		}
	}
	fmt.Printf("it is removed: members %d, alarms of members that exist %d, alarms of others %d\n", len(list.Members), present, absent)
	fmt.Println("put:", put(c, 1))
	var codes []string
	for _, path := range []string{"/health", "/livez", "/readyz"} {
		response, err := http.Get(urls[0] + path)
		check(err)
		response.Body.Close()
		codes = append(codes, fmt.Sprint(path, " ", response.StatusCode))
	}
	fmt.Println(strings.Join(codes, ", "))
	_, err = c.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	check(err)
	if err = put(c, 1); err == nil {
		fmt.Println("after etcdctl alarm disarm: put: ok")
	} else {
		fmt.Println("after etcdctl alarm disarm: put:", err)
	}
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
a member is full: put: etcdserver: mvcc: database space exceeded
it is removed: members 2, alarms of members that exist 0, alarms of others 1
put: etcdserver: mvcc: database space exceeded
/health 503, /livez 200, /readyz 200
after etcdctl alarm disarm: put: ok
TEXT
if cmp -s out expected; then
  echo "still so: the NOSPACE alarm of a removed member stops all writes"
  exit 0
fi
echo "changed: a removed member's alarm has another effect"
exit 1

#!/usr/bin/env bash
# Software: k8s.io/apiserver 0.37.2 (the storage of kube-apiserver 1.37.2) with etcd 3.7.3.
#
# Expected: everything that an API server stores is below its --etcd-prefix, /registry by default.
#
# Observed: the loop that compacts etcd stores a key without a prefix and without a slash. Two API
# servers with different prefixes share it, so that one of them compacts the history of both:
#     compact_rev_key = "0" (version 1)
#     the second server: its compaction is taken for one that was done: version 1, revision 0
#
# Why it matters: an etcd role, a mirror, a backup or a proxy's rule for /registry/ does not include
# this key. An API server whose etcd user may use only /registry/ never compacts, and etcd grows until
# it is full. The key contains a number and no object.
set -euo pipefail

tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

echo "building the storage of the API server 0.37.2 and etcd 3.7.3" >&2
go mod init example.com/finding 2>/dev/null
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"k8s.io/apiserver/pkg/storage/etcd3"
)

func main() {
	cfg := embed.NewConfig()
	cfg.Dir = "data"
	cfg.LogLevel = "fatal"
	dir, err := os.Getwd()
	check(err)
	cfg.ListenClientUrls = []url.URL{{Scheme: "unix", Path: dir + "/client"}}
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Path: dir + "/peer"}}
	e, err := embed.StartEtcd(cfg)
	check(err)
	defer e.Close()
	<-e.Server.ReadyNotify()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + dir + "/client"}, Logger: zap.NewNop()})
	check(err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()

	// What each API server does when it starts, and then every five minutes.
	_, _, _, err = etcd3.Compact(ctx, c, 0, 0)
	check(err)
	all, err := c.Get(ctx, "\x00", clientv3.WithFromKey())
	check(err)
	for _, kv := range all.Kvs {
		fmt.Printf("%s = %q (version %d)\n", kv.Key, kv.Value, kv.Version)
	}
	version, _, revision, err := etcd3.Compact(ctx, c, 0, all.Header.Revision)
	check(err)
	fmt.Printf("the second server: its compaction is taken for one that was done: version %d, revision %d\n", version, revision)
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go get k8s.io/apiserver@v0.37.2 go.etcd.io/etcd/server/v3@v3.7.3 go.etcd.io/etcd/client/v3@v3.7.3 >go.log 2>&1 || { cat go.log; exit 1; }
go mod tidy >go.log 2>&1 || { cat go.log; exit 1; }
go build -o finding .
./finding | tee out
if diff out - >/dev/null <<'TEXT'
compact_rev_key = "0" (version 1)
the second server: its compaction is taken for one that was done: version 1, revision 0
TEXT
then
  echo "still so: the API server stores compact_rev_key outside of its prefix"
  exit 0
fi
echo "changed: the API server's compaction uses another key, or treats it otherwise"
exit 1

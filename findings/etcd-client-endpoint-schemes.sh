#!/usr/bin/env bash
# Software: etcd's Go client 3.7.3 (also etcdctl and kube-apiserver) with http:// and https://
# endpoints in one list.
#
# Expected: each endpoint is used as its URL says, or the client refuses the list.
#
# Observed: the client uses the scheme of the first endpoint for all of them, without an error:
#     http://OTHER,https://SERVER: SERVER gets HTTP/2 without TLS
#     https://OTHER,http://SERVER: SERVER gets TLS
#     https://SERVER: SERVER gets TLS
#
# Why it matters: while a cluster moves to TLS, or to proxies that have other schemes than etcd, a
# list is easily mixed. The client then works with the endpoints of one scheme, and has no failover to
# the others. The order of the list decides which, and nothing says so before the first outage.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get go.etcd.io/etcd/client/v3@v3.7.3 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	try("http://", "https://")
	try("https://", "http://")
	try("", "https://")
}

// try prints what the last of the endpoints gets from a client. Nothing listens at the other.
func try(other, scheme string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	defer l.Close()
	unused, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	unused.Close()

	list, shown := []string{scheme + l.Addr().String()}, scheme+"SERVER"
	if other != "" {
		list, shown = append([]string{other + unused.Addr().String()}, list...), other+"OTHER,"+shown
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: list, TLS: &tls.Config{InsecureSkipVerify: true}, Logger: zap.NewNop()})
	check(err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	go c.Get(ctx, "key") // It makes the client connect.

	check(l.(*net.TCPListener).SetDeadline(time.Now().Add(30 * time.Second)))
	conn, err := l.Accept()
	check(err)
	defer conn.Close()
	var first [1]byte
	_, err = conn.Read(first[:])
	check(err)
	got := "HTTP/2 without TLS"
	if first[0] == 0x16 { // a TLS handshake record
		got = "TLS"
	}
	fmt.Printf("%s: SERVER gets %s\n", shown, got)
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
GO
go build -o client .
./client | tee out
if diff -q out - >/dev/null <<'TEXT'
http://OTHER,https://SERVER: SERVER gets HTTP/2 without TLS
https://OTHER,http://SERVER: SERVER gets TLS
https://SERVER: SERVER gets TLS
TEXT
then
  echo "still so: the first endpoint's scheme is used for all"
  exit 0
fi
echo "changed: an endpoint's scheme no longer depends on the first one of the list, or mixed lists are refused"
exit 1

#!/usr/bin/env bash
# Software: etcd's Go client v3.7.3 with grpc-go v1.83.2.
#
# Expected: HTTPS_PROXY is for https:// URLs, as in net/http, and a loopback address is never
# reached through a proxy, however it is written.
#
# Observed: grpc-go does not know the scheme of etcd's endpoint and uses HTTPS_PROXY for http://
# endpoints too. Loopback is exempt by its text alone: "localhost" in lower case and loopback
# addresses, but neither "LOCALHOST" nor 0.0.0.0, which connects to this host as well:
#     http://192.0.2.1:2379: CONNECT 192.0.2.1:2379
#     http://localhost:2379: no request to the proxy
#     http://LOCALHOST:2379: CONNECT LOCALHOST:2379
#     http://127.0.0.1:2379: no request to the proxy
#     http://0.0.0.0:2379: CONNECT 0.0.0.0:2379
#
# Why it matters: with HTTPS_PROXY in the environment of a service, cleartext traffic to etcd, or to
# a proxy on the same host, is sent to the forward proxy of the company, or fails there. Name the
# endpoints in NO_PROXY, or unset HTTPS_PROXY for etcd's clients.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get go.etcd.io/etcd/client/v3@v3.7.3 google.golang.org/grpc@v1.83.2 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	// A forward proxy that refuses every request and tells of it.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	requests := make(chan string, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r, err := http.ReadRequest(bufio.NewReader(c))
			if err == nil {
				requests <- r.Method + " " + r.Host
			}
			fmt.Fprint(c, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
			c.Close()
		}
	}()
	os.Setenv("HTTPS_PROXY", "http://"+l.Addr().String())
	for _, name := range []string{"NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "https_proxy"} {
		os.Unsetenv(name)
	}
	for _, host := range []string{"192.0.2.1", "localhost", "LOCALHOST", "127.0.0.1", "0.0.0.0"} {
		// A port of loopback on which nothing listens.
		free, err := net.Listen("tcp", "127.0.0.1:0")
		check(err)
		_, port, _ := net.SplitHostPort(free.Addr().String())
		free.Close()
		endpoint := "http://" + net.JoinHostPort(host, port)
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
		check(err)
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		_, _ = client.Get(ctx, "key") // refused, by the proxy or by the host
		cancel()
		client.Close()
		got := "no request to the proxy"
		if len(requests) > 0 {
			got = <-requests
		}
		for len(requests) > 0 {
			<-requests
		}
		if want := "CONNECT " + net.JoinHostPort(host, port); got == want {
			got = "CONNECT " + net.JoinHostPort(host, "2379")
		}
		fmt.Printf("http://%s:2379: %s\n", host, got)
	}
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go run . | tee out
cat >expected <<'TEXT'
http://192.0.2.1:2379: CONNECT 192.0.2.1:2379
http://localhost:2379: no request to the proxy
http://LOCALHOST:2379: CONNECT LOCALHOST:2379
http://127.0.0.1:2379: no request to the proxy
http://0.0.0.0:2379: CONNECT 0.0.0.0:2379
TEXT
if cmp -s out expected; then
  echo "still so: HTTPS_PROXY applies to cleartext endpoints of etcd, and to loopback in other words"
  exit 0
fi
echo "changed: grpc-go or etcd's client uses HTTPS_PROXY for other endpoints than before"
exit 1

#!/usr/bin/env bash
# Software: servers of grpc-go v1.83.2.
#
# Expected: a server waits for the client's half-close (END_STREAM) either before every handler of a
# call with one request, or before none, since in both cases the request is complete.
#
# Observed: with the request message sent and the stream left open, a unary call is answered at
# once. The handler of a server-streaming call does not start before the half-close:
#     unary (health Check), no half-close: answered
#     server-streaming (health Watch), no half-close: nothing in 2 s
#     server-streaming (health Watch), half-close: answered
#
# Why it matters: a client that does not half-close works with the unary calls of etcd and hangs in
# RangeStream or Snapshot. A proxy that waits for the end of a unary request before it forwards it
# breaks clients that work with etcd itself.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get google.golang.org/grpc@v1.83.2 golang.org/x/net@v0.61.0 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, health.NewServer())
	go server.Serve(l)

	for _, call := range []struct {
		name, path string
		halfClose  bool
	}{
		{"unary (health Check), no half-close", "/grpc.health.v1.Health/Check", false},
		{"server-streaming (health Watch), no half-close", "/grpc.health.v1.Health/Watch", false},
		{"server-streaming (health Watch), half-close", "/grpc.health.v1.Health/Watch", true},
	} {
		fmt.Printf("%s: %s\n", call.name, try(l.Addr().String(), call.path, call.halfClose))
	}
}

// try sends a call with an empty request and says whether a message comes back within 2 s.
func try(address, path string, halfClose bool) string {
	c, err := net.Dial("tcp", address)
	check(err)
	defer c.Close()
	_, err = fmt.Fprint(c, http2.ClientPreface)
	check(err)
	f := http2.NewFramer(c, c)
	check(f.WriteSettings())
	var headers bytes.Buffer
	encoder := hpack.NewEncoder(&headers)
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", "localhost"},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		check(encoder.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}))
	}
	check(f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers.Bytes(), EndHeaders: true}))
	check(f.WriteData(1, halfClose, make([]byte, 5))) // not compressed, no bytes
	check(c.SetReadDeadline(time.Now().Add(2 * time.Second)))
	for {
		frame, err := f.ReadFrame()
		if os.IsTimeout(err) {
			return "nothing in 2 s"
		}
		check(err)
		if _, ok := frame.(*http2.DataFrame); ok {
			return "answered"
		}
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
unary (health Check), no half-close: answered
server-streaming (health Watch), no half-close: nothing in 2 s
server-streaming (health Watch), half-close: answered
TEXT
if cmp -s out expected; then
  echo "still so: server-streaming handlers alone wait for the client's half-close"
  exit 0
fi
echo "changed: grpc-go's servers start handlers at another time"
exit 1

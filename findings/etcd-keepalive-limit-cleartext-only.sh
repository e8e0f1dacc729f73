#!/usr/bin/env bash
# Software: etcd 3.7.3 with its default --grpc-keepalive-min-time=5s, with and without TLS.
#
# Expected: the flag, the shortest time between two pings of a client, applies to every gRPC client
# of etcd, whether it uses TLS or not.
#
# Observed: a connection with a watch that pings once a second is closed without TLS, and is kept
# with TLS, where etcd serves gRPC through Go's HTTP server, which does not know this limit:
#     http: GOAWAY ENHANCE_YOUR_CALM "too_many_pings" after 4 pings
#     https: 8 pings, each of them acknowledged
#
# Why it matters: a keepalive setting that was tested with TLS breaks watches and leases on a
# connection without TLS, such as one between a sidecar proxy and etcd on the same host. A proxy that
# accepts both must choose which behavior it follows on each side.
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
go get go.etcd.io/etcd/server/v3@v3.7.3 golang.org/x/net@v0.61.0 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3

cat >main.go <<'GO'
package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

func main() {
	scheme, address := os.Args[1], os.Args[2]
	c, err := net.Dial("tcp", address)
	check(err)
	if scheme == "https" {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	}
	check(c.SetDeadline(time.Now().Add(30 * time.Second)))
	_, err = fmt.Fprint(c, http2.ClientPreface)
	check(err)
	f := http2.NewFramer(c, c)
	check(f.WriteSettings())
	// An open call, since etcd allows far fewer pings without one.
	var headers bytes.Buffer
	encoder := hpack.NewEncoder(&headers)
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", scheme}, {":path", "/etcdserverpb.Watch/Watch"}, {":authority", "localhost"},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		check(encoder.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}))
	}
	check(f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers.Bytes(), EndHeaders: true}))

	const pings = 8
	go func() {
		for i := range pings {
			time.Sleep(time.Second)
			if f.WritePing(false, [8]byte{byte(i + 1)}) != nil {
				return // The other side says why.
			}
		}
	}()
	acknowledged := 0
	for acknowledged < pings {
		frame, err := f.ReadFrame()
		check(err)
		switch frame := frame.(type) {
		case *http2.PingFrame:
			if frame.IsAck() && frame.Data[0] != 0 {
				acknowledged++
			}
		case *http2.GoAwayFrame:
			fmt.Printf("%s: GOAWAY %s %q after %d pings\n", scheme, frame.ErrCode, frame.DebugData(), acknowledged)
			os.Exit(10)
		}
	}
	fmt.Printf("%s: %d pings, each of them acknowledged\n", scheme, acknowledged)
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go build -o client .

start_etcd etcd cleartext
cleartext=0
./client http "$address" || cleartext=$?
scheme=https start_etcd etcd secure --auto-tls
secure=0
./client https "$address" || secure=$?
if ((cleartext == 10 && secure == 0)); then
  echo "still so: etcd limits pings without TLS alone"
  exit 0
fi
echo "changed: etcd treats pings alike with and without TLS, or otherwise than before"
exit 1

#!/usr/bin/env bash
# Software: etcd 3.7.3 with TLS, compared with a server of grpc-go 1.83.2 with TLS.
#
# Expected: both servers are gRPC over HTTP/2 over TLS, and write the response of a unary call in
# the same way.
#
# Observed: etcd serves gRPC over TLS through Go's HTTP server, which writes the header, the message
# and the trailer of each response one by one. grpc-go's server writes them together:
#     etcd: 3 frames of a response in 3 TLS records
#     grpc-go: 3 frames of a response in 1 TLS records
#
# Why it matters: Go's crypto/tls returns one record per Read. A proxy that forwards after each Read
# writes three times for each response of etcd. It has to notice that crypto/tls has read further
# records ahead. Each record also costs 22 bytes and an encryption of its own.
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

echo "building etcd 3.7.3" >&2
go mod init example.com/finding 2>/dev/null
go get go.etcd.io/etcd/server/v3@v3.7.3 google.golang.org/grpc@v1.83.2 golang.org/x/net@v0.61.0 2>go.log || { cat go.log; exit 1; }
go build -trimpath -ldflags "-s -w" -o etcd go.etcd.io/etcd/server/v3

cat >main.go <<'GO'
package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// counted counts the TLS records with application data that are read from a connection.
type counted struct {
	net.Conn
	rest    []byte
	records int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.rest = append(c.rest, b[:n]...)
	const header, applicationData = 5, 23
	for len(c.rest) >= header {
		size := header + int(c.rest[3])<<8 + int(c.rest[4])
		if len(c.rest) < size {
			break
		}
		if c.rest[0] == applicationData {
			c.records++
		}
		c.rest = c.rest[size:]
	}
	return n, err
}

func main() {
	if address := os.Args[1]; address != "-" {
		measure("etcd", address, "/etcdserverpb.KV/Range", []byte{0x0a, 1, 'k'})
		return
	}
	certified := httptest.NewTLSServer(nil)
	defer certified.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: certified.TLS.Certificates})))
	grpc_health_v1.RegisterHealthServer(s, health.NewServer())
	go func() { _ = s.Serve(l) }()
	measure("grpc-go", l.Addr().String(), "/grpc.health.v1.Health/Check", nil)
}

// measure makes five calls one after the other, and counts for the last one.
func measure(name, address, path string, message []byte) {
	bare, err := net.Dial("tcp", address)
	check(err)
	wire := &counted{Conn: bare}
	c := tls.Client(wire, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	check(c.SetDeadline(time.Now().Add(30 * time.Second)))
	_, err = io.WriteString(c, http2.ClientPreface)
	check(err)
	f := http2.NewFramer(c, c)
	check(f.WriteSettings())
	var headers bytes.Buffer
	encoder := hpack.NewEncoder(&headers)
	body := append([]byte{0, 0, 0, 0, byte(len(message))}, message...)
	frames := 0
	for id := uint32(1); id < 10; id += 2 {
		headers.Reset()
		for _, h := range [][2]string{
			{":method", "POST"}, {":scheme", "https"}, {":path", path}, {":authority", "localhost"},
			{"content-type", "application/grpc"}, {"te", "trailers"},
		} {
			check(encoder.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}))
		}
		check(f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headers.Bytes(), EndHeaders: true}))
		check(f.WriteData(id, true, body))
		frames, wire.records = 0, 0
		for ended := false; !ended; {
			frame, err := f.ReadFrame()
			check(err)
			if frame.Header().StreamID != id || frame.Header().Type == http2.FrameWindowUpdate {
				continue
			}
			frames++
			ended = frame.Header().Flags.Has(http2.FlagHeadersEndStream)
		}
	}
	fmt.Printf("%s: %d frames of a response in %d TLS records\n", name, frames, wire.records)
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go build -o client .
: >etcd.log
./etcd --name etcd --data-dir etcd.data --auto-tls --listen-client-urls https://127.0.0.1:0 \
  --advertise-client-urls https://127.0.0.1:0 --listen-peer-urls http://127.0.0.1:0 \
  --initial-advertise-peer-urls http://127.0.0.1:0 --initial-cluster etcd=http://127.0.0.1:0 >etcd.log 2>&1 &
pids+=($!)
address=
for _ in {1..300}; do
  address=$(sed -n 's/.*"serving client traffic.*"address":"\([^"]*\)".*/\1/p' etcd.log | head -n 1)
  [[ -z $address ]] || break
  sleep 0.1
done
[[ -n $address ]] || { echo "etcd did not start:"; tail -n 5 etcd.log; exit 1; }
./client "$address" | tee etcd.out
./client - | tee grpc.out
if grep -q "3 frames of a response in 3 TLS records" etcd.out && grep -q "3 frames of a response in 1 TLS records" grpc.out; then
  echo "still so: etcd sends a TLS record for each frame of a response"
  exit 0
fi
echo "changed: etcd combines the frames of a response, or grpc-go does not"
exit 1

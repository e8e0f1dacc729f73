#!/usr/bin/env bash
# Software: clients of grpc-go v1.59.0 and v1.83.2.
#
# Expected: if a server ends a call when the client has a part of the response message, the client
# reports the status that the server gave, as it does when it has no part of the message.
#
# Observed: it depends on how the call ends, and on the version.
#     1.59.0, trailers with Unavailable: Internal
#     1.59.0, RST_STREAM with CANCEL: Internal
#     1.59.0, end of the connection: Unavailable
#     1.83.2, trailers with Unavailable: Internal
#     1.83.2, RST_STREAM with CANCEL: Canceled
#     1.83.2, end of the connection: Unavailable
#
# Why it matters: clients repeat calls that are Unavailable, and not those that are Internal. A proxy
# that passes a long response as it arrives cannot say that it has lost the server: whatever status
# it sends, the client gives up. Only the end of the connection has the effect of a failed server.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

cat >main.go <<'GO'
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func main() {
	for _, end := range []struct {
		name string
		do   func(*server, uint32)
	}{
		{"trailers with Unavailable", func(s *server, id uint32) {
			check(s.f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: s.block("grpc-status", "14"), EndHeaders: true, EndStream: true}))
		}},
		{"RST_STREAM with CANCEL", func(s *server, id uint32) { check(s.f.WriteRSTStream(id, http2.ErrCodeCancel)) }},
		{"end of the connection", func(s *server, _ uint32) { s.conn.Close() }},
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		check(err)
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go serve(conn, end.do)
			}
		}()
		conn, err := grpc.Dial(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		check(err)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		fmt.Printf("%s, %s: %s\n", os.Args[1], end.name, status.Code(err))
		cancel()
		conn.Close()
		l.Close()
	}
}

type server struct {
	conn    net.Conn
	f       *http2.Framer
	encoded bytes.Buffer
	encoder *hpack.Encoder
}

// block encodes header fields.
func (s *server) block(fields ...string) []byte {
	s.encoded.Reset()
	for i := 0; i < len(fields); i += 2 {
		check(s.encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	return s.encoded.Bytes()
}

// serve sends 5 bytes of a message of 10 bytes when the request is complete, and then the end.
func serve(conn net.Conn, end func(*server, uint32)) {
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	s := &server{conn: conn, f: http2.NewFramer(conn, conn)}
	s.encoder = hpack.NewEncoder(&s.encoded)
	check(s.f.WriteSettings())
	for {
		frame, err := s.f.ReadFrame()
		if err != nil {
			return
		}
		if data, ok := frame.(*http2.DataFrame); ok && data.StreamEnded() {
			check(s.f.WriteHeaders(http2.HeadersFrameParam{StreamID: data.StreamID, BlockFragment: s.block(":status", "200", "content-type", "application/grpc"), EndHeaders: true}))
			check(s.f.WriteData(data.StreamID, false, []byte{0, 0, 0, 0, 10, 1, 2, 3, 4, 5}))
			end(s, data.StreamID)
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
: >out
for version in 1.59.0 1.83.2; do
  rm -f go.mod go.sum
  go mod init example.com/finding 2>/dev/null
  go get "google.golang.org/grpc@v$version" 2>go.log || { cat go.log; exit 1; }
  go mod tidy 2>go.log || { cat go.log; exit 1; }
  go run . "$version" | tee -a out
done
cat >expected <<'TEXT'
1.59.0, trailers with Unavailable: Internal
1.59.0, RST_STREAM with CANCEL: Internal
1.59.0, end of the connection: Unavailable
1.83.2, trailers with Unavailable: Internal
1.83.2, RST_STREAM with CANCEL: Canceled
1.83.2, end of the connection: Unavailable
TEXT
if cmp -s out expected; then
  echo "still so: a status within a message is lost, and the end of the connection is Unavailable"
  exit 0
fi
echo "changed: grpc-go's clients report another status"
exit 1

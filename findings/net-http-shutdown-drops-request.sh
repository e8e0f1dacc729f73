#!/usr/bin/env bash
# Software: net/http of Go 1.26.
#
# Expected: Server.Shutdown lets requests finish. A request that reaches an open connection while
# the server still waits for that connection gets a response.
#
# Observed: net/http reads the request and closes the connection without a response. After
# SetKeepAlivesEnabled(false) instead, it serves the request and closes the connection then.
#     Shutdown: EOF
#     SetKeepAlivesEnabled(false): 200 OK, Connection: close
#
# Why it matters: clients repeat a GET that was not answered, and not a POST, as those of etcd's
# JSON gateway are. A server that is to lose no request ends keep-alive first, waits until its
# connections are closed, and only then shuts down.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0 GOTOOLCHAIN=local

cat >main.go <<'GO'
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

// ask connects, has the server leave, and then sends a request.
func ask(leave func(*http.Server)) string {
	connected := make(chan struct{})
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }),
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				close(connected)
			}
		},
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	go server.Serve(listener)
	defer server.Close()
	conn, err := net.Dial("tcp", listener.Addr().String())
	check(err)
	defer conn.Close()
	<-connected
	leave(server)
	_, err = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
	check(err)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return "EOF"
	}
	check(err)
	text := response.Status
	if response.Close {
		text += ", Connection: close"
	}
	return text
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func main() {
	fmt.Println("Shutdown:", ask(func(s *http.Server) {
		shut := make(chan struct{})
		s.RegisterOnShutdown(func() { close(shut) })
		go s.Shutdown(context.Background())
		<-shut
	}))
	fmt.Println("SetKeepAlivesEnabled(false):", ask(func(s *http.Server) { s.SetKeepAlivesEnabled(false) }))
}
GO
cat >go.mod <<'MOD'
module finding

go 1.26
MOD

got=$(go run .)
want='Shutdown: EOF
SetKeepAlivesEnabled(false): 200 OK, Connection: close'
echo "$got"
if [[ $got != "$want" ]]; then
	echo "changed: net/http of $(go env GOVERSION) no longer drops the request"
	exit 1
fi

#!/usr/bin/env bash
# Software: github.com/coreos/go-systemd/v22 v22.7.0, activation.ListenersWithNames.
#
# Expected: a socket that systemd passes and that cannot accept connections is an error, since the
# unit file then does not fit the service.
#
# Observed: a datagram socket is left out without an error, and its name is not in the map, while a
# connected socket, as of a unit with Accept=yes, is returned as a listener that cannot accept:
#     passed: client (listening), metrics (datagram), accepted (connected)
#     names: [accepted client], error: <nil>
#     accepted: accept: invalid argument
#
# Why it matters: with a mistake in its .socket unit, a service such as an etcd proxy listens on
# fewer sockets than configured, or on none, and reports success. It has to compare the result with
# LISTEN_FDNAMES itself, and check that each socket listens.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get github.com/coreos/go-systemd/v22@v22.7.0 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
// It passes three sockets to itself as systemd does, and prints what the package makes of them.
package main

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
)

func main() {
	if os.Getenv("LISTEN_FDS") != "" {
		child()
		return
	}
	stream, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	datagram, err := net.ListenPacket("udp", "127.0.0.1:0")
	check(err)
	client, err := net.Dial("tcp", stream.Addr().String())
	check(err)
	defer client.Close()
	connection, err := stream.Accept()
	check(err)
	c := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=3 LISTEN_FDNAMES=client:metrics:accepted exec "$0"`, os.Args[0])
	for _, socket := range []interface{ File() (*os.File, error) }{stream.(*net.TCPListener), datagram.(*net.UDPConn), connection.(*net.TCPConn)} {
		file, err := socket.File()
		check(err)
		c.ExtraFiles = append(c.ExtraFiles, file)
	}
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	fmt.Println("passed: client (listening), metrics (datagram), accepted (connected)")
	check(c.Run())
}

func child() {
	listeners, err := activation.ListenersWithNames()
	fmt.Printf("names: %v, error: %v\n", slices.Sorted(maps.Keys(listeners)), err)
	for _, l := range listeners["accepted"] {
		_, err := l.Accept()
		var errno syscall.Errno
		if errors.As(err, &errno) {
			err = errno
		}
		fmt.Println("accepted: accept:", err)
	}
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go build -o sockets .
./sockets | tee out
cat >expected <<'TEXT'
passed: client (listening), metrics (datagram), accepted (connected)
names: [accepted client], error: <nil>
accepted: accept: invalid argument
TEXT
if cmp -s out expected; then
  echo "still so: one socket that cannot accept is left out, the other one returned, without an error"
  exit 0
fi
echo "changed: ListenersWithNames reports sockets that cannot accept, or treats them otherwise"
exit 1

#!/usr/bin/env bash
# Software: github.com/coreos/go-systemd/v22 v22.7.0, activation.ListenersWithNames.
#
# Expected: a socket that systemd passes and that cannot be a net.Listener is an error, since the
# unit file then does not fit the service.
#
# Observed: it is left out without an error, and its name is not in the map. Listeners, of the same
# package, at least keeps its place with a nil:
#     passed: client (stream), metrics (datagram)
#     ListenersWithNames: [client], error <nil>
#     Listeners: 2, nil: 1, error <nil>
#
# Why it matters: a .socket unit with ListenDatagram= in place of ListenStream=, or with Accept=yes,
# starts a service, such as an etcd proxy, that listens on fewer sockets than configured, or on none, and
# reports success. A service has to compare what it got with LISTEN_FDS and LISTEN_FDNAMES itself.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get github.com/coreos/go-systemd/v22@v22.7.0 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
// It passes two sockets to itself as systemd does, and prints what the package makes of them.
package main

import (
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"

	"github.com/coreos/go-systemd/v22/activation"
)

func main() {
	if len(os.Args) > 1 {
		child(os.Args[1])
		return
	}
	stream, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	datagram, err := net.ListenPacket("udp", "127.0.0.1:0")
	check(err)
	first, err := stream.(*net.TCPListener).File()
	check(err)
	second, err := datagram.(*net.UDPConn).File()
	check(err)
	fmt.Println("passed: client (stream), metrics (datagram)")
	for _, function := range []string{"ListenersWithNames", "Listeners"} {
		c := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=client:metrics exec "$0" "$1"`, os.Args[0], function)
		c.ExtraFiles = []*os.File{first, second}
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		check(c.Run())
	}
}

func child(function string) {
	if function == "ListenersWithNames" {
		listeners, err := activation.ListenersWithNames()
		fmt.Printf("ListenersWithNames: %v, error %v\n", slices.Sorted(maps.Keys(listeners)), err)
		return
	}
	listeners, err := activation.Listeners()
	missing := 0
	for _, l := range listeners {
		if l == nil {
			missing++
		}
	}
	fmt.Printf("Listeners: %d, nil: %d, error %v\n", len(listeners), missing, err)
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
if grep -qx 'ListenersWithNames: \[client\], error <nil>' out; then
  echo "still so: a socket that is no listener is left out without an error"
  exit 0
fi
echo "changed: ListenersWithNames reports the socket, or fails"
exit 1

package harness

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// Ports for [FreePort]. They are below the range of ports for outgoing connections, so that a port
// stays free until a process uses it. Each test process has its own block, because a port of
// another one may be free only for a moment.
const firstPort, block, blocks = 10000, 1000, 22

// ownBlock is the block of this process: a listener on its first port reserves it for the life of
// the process.
var ownBlock = sync.OnceValues(func() (net.Listener, error) {
	var errs []error
	for _, n := range rand.Perm(blocks) {
		l, err := net.Listen("tcp", loopback(firstPort+n*block))
		if err == nil {
			return l, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("all blocks of ports are taken: %w", errors.Join(errs...))
})

var portsGiven atomic.Uint32

// FreePort returns a TCP port of 127.0.0.1 that nothing listens on, and that no other test process
// gets. It returns a port again only after all others. Earlier, it could be the port of a process
// that has started but does not listen yet, or that will be started again. It is safe for
// concurrent use.
func FreePort(tb testing.TB) int {
	tb.Helper()
	held, err := ownBlock()
	if err != nil {
		tb.Fatal(err)
	}
	for range block {
		port := held.Addr().(*net.TCPAddr).Port + 1 + int(portsGiven.Add(1)%(block-1))
		// Listening on it would show as much, but a process that is forked meanwhile inherits the
		// socket, and holds the port until it executes another program.
		conn, err := net.Dial("tcp", loopback(port))
		switch {
		case err == nil:
			conn.Close()
		case errors.Is(err, syscall.ECONNREFUSED):
			return port
		}
	}
	tb.Fatalf("something listens on every port from %s on", held.Addr())
	return 0
}

// FreeAddress returns 127.0.0.1 with a [FreePort].
func FreeAddress(tb testing.TB) string {
	tb.Helper()
	return loopback(FreePort(tb))
}

func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

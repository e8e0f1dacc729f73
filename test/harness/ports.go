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

// Ports of [FreePort]: below the range that outgoing connections take theirs from, so that a port stays free until a process is
// told to use it, and in blocks, each for one test process: of another's, a port may be one that nothing listens on just now.
const firstPort, block, blocks = 10000, 1000, 22

// ownBlock is this process's: the listener on its first port holds it for as long as the process lives.
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

// FreePort returns a TCP port of 127.0.0.1 that nothing listens on, and that no other test process is given. It returns one again only
// after all others: sooner, it could be one of a process that is between its start and its listening, or is down to be started again.
// Safe for concurrent use.
func FreePort(tb testing.TB) int {
	tb.Helper()
	held, err := ownBlock()
	if err != nil {
		tb.Fatal(err)
	}
	for range block {
		port := held.Addr().(*net.TCPAddr).Port + 1 + int(portsGiven.Add(1)%(block-1))
		// To listen on it would tell as much, but a process that is forked meanwhile has the socket too, and the port with it, until
		// it has become another program.
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

// FreeAddress is 127.0.0.1 with a [FreePort].
func FreeAddress(tb testing.TB) string {
	tb.Helper()
	return loopback(FreePort(tb))
}

func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

package harness

import (
	"net"
	"os/exec"
	"sync"
	"testing"
)

// TestFreePort checks that a free port can be used at once while other tests of the process start
// processes: a forked process that has not executed another program yet holds every socket that was
// open at the fork.
func TestFreePort(t *testing.T) {
	t.Parallel()
	done := make(chan struct{})
	var all sync.WaitGroup
	defer all.Wait()
	defer close(done)
	for range 4 {
		all.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := exec.CommandContext(t.Context(), "/bin/true").Run(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	seen := make(map[int]bool)
	for range 500 {
		port := FreePort(t)
		if seen[port] {
			t.Fatalf("port %d was given out before", port)
		}
		seen[port] = true
		l, err := net.Listen("tcp", loopback(port))
		if err != nil {
			t.Fatalf("after %d: %v", len(seen), err)
		}
		l.Close()
	}
}

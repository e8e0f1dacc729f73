package writebuffer

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// countingPool counts the buffers that are not given back, and overwrites those that are.
type countingPool struct {
	mu  sync.Mutex
	out int
}

func (p *countingPool) Get(n int) *[]byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.out++
	b := make([]byte, n)
	return &b
}

func (p *countingPool) Put(b *[]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.out--
	clear(*b)
}

func (p *countingPool) check(t *testing.T) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out != 0 {
		t.Errorf("%d buffers were not given back", p.out)
	}
}

// used returns a buffer in use over a unix socket, and the other end of that. The channel gets what
// the buffer reports.
func used(t *testing.T, wrap func(net.Conn) net.Conn) (*Buffer, net.Conn, *countingPool, <-chan error) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	w, pool, empty := New(wrap(near)), new(countingPool), make(chan error, 1000)
	w.Use(pool, func(err error) { empty <- err })
	return w, far, pool, empty
}

// connections are one of the system's, which takes what it can at once, and one that is not.
var connections = map[string]func(net.Conn) net.Conn{
	"of the system":     func(c net.Conn) net.Conn { return c },
	"not of the system": func(c net.Conn) net.Conn { return struct{ net.Conn }{c} },
}

// random returns bytes of which no two parts are the same.
func random(n int) []byte {
	b := make([]byte, n)
	source := rand.NewChaCha8([32]byte{1})
	_, _ = source.Read(b) // never fails
	return b
}

// TestKeepsWhatIsNotRead: writes return while the peer reads nothing. Once it does, it gets all of
// it in order, and the buffers are given back.
func TestKeepsWhatIsNotRead(t *testing.T) {
	for name, wrap := range connections {
		t.Run(name, func(t *testing.T) {
			w, far, pool, empty := used(t, wrap)
			want := random(4 << 20)
			for rest := want; len(rest) > 0; {
				one, two := rest[:min(len(rest), 3001)], rest[min(len(rest), 3001):min(len(rest), 70_000)]
				if err := w.WriteAll([][]byte{one, nil, two}); err != nil {
					t.Fatal(err)
				}
				rest = rest[len(one)+len(two):]
			}
			if !w.Full() || w.Size() == 0 {
				t.Fatalf("nothing is kept of %d bytes", len(want))
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("the peer got something else, %v", err)
			}
			if w.Wait(); w.Full() || w.Size() != 0 {
				t.Errorf("%d bytes are kept", w.Size())
			}
			w.WaitWriter()
			pool.check(t)
			if len(empty) == 0 {
				t.Error("it does not report that all is written")
			}
			for len(empty) > 0 {
				if err := <-empty; err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestFails: what is kept for a peer that leaves is lost and given back, the error is reported, and
// nothing is written after it.
func TestFails(t *testing.T) {
	for connection, wrap := range connections {
		for name, end := range map[string]func(w *Buffer, far net.Conn){
			"the peer closes": func(_ *Buffer, far net.Conn) { far.Close() },
			"it is closed":    func(w *Buffer, _ net.Conn) { w.Close() },
		} {
			t.Run(connection+", "+name, func(t *testing.T) {
				w, far, pool, empty := used(t, wrap)
				for w.Size() < 1<<20 {
					if n, err := w.Write(make([]byte, 60_000)); err != nil || n != 60_000 {
						t.Fatal(n, err)
					}
				}
				end(w, far)
				w.WaitWriter()
				pool.check(t)
				var last error // what was written before is reported, too
				for len(empty) > 0 {
					last = <-empty
				}
				if last == nil {
					t.Error("no error is reported")
				}
				if n, err := w.Write([]byte("x")); err == nil || n > 0 {
					t.Errorf("wrote %d bytes, %v", n, err)
				}
			})
		}
	}
}

// TestDetach: after it, writes are collected and the connection remains open; before all is
// written, there is none.
func TestDetach(t *testing.T) {
	w, far, _, _ := used(t, connections["of the system"])
	for !w.Full() {
		if _, err := w.Write(make([]byte, 60_000)); err != nil {
			t.Fatal(err)
		}
	}
	if w.Detach() {
		t.Fatal("detached with bytes to write")
	}
	if conn, _ := w.Detached(); conn != nil {
		t.Fatal("a connection without Detach")
	}
	go func() { _, _ = io.Copy(io.Discard, far) }() // ends with the test
	if w.Wait(); !w.Detach() {
		t.Fatal("not detached when all is written")
	}
	for _, part := range []string{"la", "st"} {
		if _, err := w.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	conn, written := w.Detached()
	if conn == nil || string(written) != "last" {
		t.Fatalf("detached %v with %q", conn, written)
	}
	if _, err := conn.Write(written); err != nil {
		t.Errorf("it was closed: %v", err)
	}
}

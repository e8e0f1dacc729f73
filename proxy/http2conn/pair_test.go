package http2conn

import (
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// answer is what a client has heard on a stream.
type answer struct {
	header, trailer []hpack.HeaderField
	body            []byte
	code            http2.ErrCode
	done            chan struct{}
}

// caller is the handler of a client that gathers answers.
func caller() *handler {
	end := func(s *Stream) {
		s.Finish()
		close(s.Value().(*answer).done)
	}
	return &handler{
		headers: func(s *Stream, fields []hpack.HeaderField, last bool) {
			a := s.Value().(*answer)
			if !last {
				a.header = fields
				return
			}
			a.trailer = fields
			end(s)
		},
		data: func(s *Stream, data []byte, last bool) {
			a := s.Value().(*answer)
			a.body = append(a.body, data...)
			s.Consumed(len(data))
			if last {
				end(s)
			}
		},
		reset: func(s *Stream, code http2.ErrCode) {
			s.Value().(*answer).code = code
			end(s)
		},
	}
}

// loopback returns both ends of a connection.
func loopback(t testing.TB) (near, far net.Conn) { return ends(t, "tcp", "127.0.0.1:0") }

func ends(t testing.TB, network, address string) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if near, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return near, far
}

// serving serves a Conn until the test ends, when its pool must be whole.
func serving(t testing.TB, h *handler, pool *ledger, c *Conn) {
	h.conn = c
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Serve() }()
	t.Cleanup(func() {
		c.Close()
		wait(t, done, "end")
		pool.check(t)
	})
}

// pair connects a client and a server.
func pair(t testing.TB, client, server *handler) {
	t.Helper()
	near, far := loopback(t)
	pools := [2]*ledger{{}, {}}
	serving(t, server, pools[1], NewServer(far, Config{Handler: server, Pool: pools[1], Plaintext: true}))
	serving(t, client, pools[0], NewClient(near, Config{Handler: client, Pool: pools[0], Plaintext: true}))
}

func open(t testing.TB, c *Conn, end bool) (*Stream, *answer) {
	t.Helper()
	a := &answer{done: make(chan struct{})}
	s := c.Open(a, request, end)
	if s == nil {
		t.Fatal("no stream")
	}
	return s, a
}

// TestPairEchoes moves bodies of all sizes both ways, many at a time.
func TestPairEchoes(t *testing.T) {
	client := caller()
	pair(t, client, echo())
	sizes := []int{
		0, 1, 100, maxFrameSize - 5, maxFrameSize - 1, maxFrameSize, maxFrameSize + 1, defaultWindow - 1, defaultWindow, defaultWindow + 1, flushLimit, flushLimit + 1,
		clientWindow - 1, clientWindow, clientWindow + 1, 1 << 20, connWindow + 1,
	}
	for some := range slices.Chunk(sizes, 3) {
		var all sync.WaitGroup
		for i, n := range some {
			all.Go(func() {
				s, a := open(t, client.conn, false)
				switch i {
				case 0:
					s.Data(true, pattern(n)[:n/2], pattern(n)[n/2:])
				case 1:
					s.Data(false, nil, pattern(n))
					s.Data(true, nil, nil)
				case 2:
					pool := client.conn.cfg.Pool.(*ledger)
					s.Buffers(true, nil, pool.body(n, 5000))
				}
				client.conn.Flush()
				wait(t, a.done, fmt.Sprint("answer of ", n, " bytes"))
				same(t, "answer", a.body, pattern(n))
				if !slices.Equal(a.trailer, okTrailer) || len(a.header) != 2 || a.header[0].Value != "200" {
					t.Errorf("%d bytes: header %v, trailer %v", n, a.header, a.trailer)
				}
			})
		}
		all.Wait()
	}
	if n := len(client.conn.Streams()); n > 0 {
		t.Errorf("%d streams are left", n)
	}
}

// TestPairWithoutTrailers: an end that comes with data, or alone.
func TestPairWithoutTrailers(t *testing.T) {
	for _, n := range []int{0, 1, maxFrameSize, clientWindow + 1} {
		for _, alone := range []bool{false, true} {
			client := caller()
			server := &handler{headers: func(s *Stream, _ []hpack.HeaderField, _ bool) {
				s.Headers(okTrailer, false)
				if s.Data(!alone, nil, pattern(n)); alone {
					s.Data(true, nil, nil)
				}
			}}
			pair(t, client, server)
			for _, whole := range []bool{true, false} { // whether the request had ended
				_, a := open(t, client.conn, whole)
				client.conn.Flush()
				wait(t, a.done, "answer")
				same(t, "answer", a.body, pattern(n))
				if a.trailer != nil || a.code != 0 {
					t.Errorf("%d bytes: trailer %v, code %v", n, a.trailer, a.code)
				}
			}
		}
	}
}

// TestPairResets: each side may end a stream, and the other hears why.
func TestPairResets(t *testing.T) {
	heard := make(chan http2.ErrCode, 1)
	client := caller()
	server := &handler{
		headers: func(s *Stream, _ []hpack.HeaderField, end bool) {
			if end {
				s.Reset(http2.ErrCodeInadequateSecurity)
			}
		},
		reset: func(_ *Stream, code http2.ErrCode) { heard <- code },
	}
	pair(t, client, server)
	_, a := open(t, client.conn, true)
	client.conn.Flush()
	if wait(t, a.done, "reset"); a.code != http2.ErrCodeInadequateSecurity {
		t.Errorf("the client heard %v", a.code)
	}
	s, _ := open(t, client.conn, false)
	client.conn.Flush()
	s.Reset(http2.ErrCodeCancel)
	client.conn.Flush()
	if code := wait(t, heard, "reset"); code != http2.ErrCodeCancel {
		t.Errorf("the server heard %v", code)
	}
}

// TestPairLeaves: a server that leaves loses no stream of a client that opens them all the time:
// each is answered, or was refused and never begun.
func TestPairLeaves(t *testing.T) {
	client := caller()
	server := echo()
	pair(t, client, server)
	var all []*answer
	for i := 0; ; i++ {
		a := &answer{done: make(chan struct{})}
		if client.conn.Open(a, request, true) == nil {
			break
		}
		all = append(all, a)
		client.conn.Flush()
		if i == 100 {
			server.conn.GracefulShutdown()
			server.conn.Flush()
		}
	}
	for i, a := range all {
		wait(t, a.done, "answer")
		if answered := slices.Equal(a.trailer, okTrailer); answered == (a.code == http2.ErrCodeRefusedStream) {
			t.Errorf("stream %d: trailer %v, code %v", i, a.trailer, a.code)
		}
	}
}

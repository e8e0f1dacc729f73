package http2conn

import (
	"sync"
	"testing"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"
)

// recycling is a pool as package proxy's: it costs no allocation where it is in balance, and clears
// what is given back.
type recycling struct{ pool sync.Pool }

var _ mem.BufferPool = (*recycling)(nil)

const recycled = 64 << 10

// Get implements mem.BufferPool.
func (p *recycling) Get(n int) *[]byte {
	if b, ok := p.pool.Get().(*[]byte); ok && n <= recycled {
		*b = (*b)[:n]
		return b
	}
	b := make([]byte, n, max(n, recycled))
	return &b
}

// Put implements mem.BufferPool.
func (p *recycling) Put(b *[]byte) {
	if clear(*b); cap(*b) == recycled {
		p.pool.Put(b)
	}
}

// unary makes calls of a message each way over loopback: header fields, data and a trailer.
type unary struct {
	client, server *handler
	msg            []byte
	done           chan struct{}
	ends           sync.WaitGroup
}

func newUnary(t testing.TB, size int) *unary {
	near, far := loopback(t)
	u := &unary{msg: pattern(size), done: make(chan struct{}, 1)}
	header := fields(":status", "200", "content-type", "application/grpc")
	u.server = &handler{data: func(s *Stream, data []byte, end bool) {
		if s.Consumed(len(data)); end {
			s.Headers(header, false)
			s.Data(false, u.msg[:5], u.msg[5:])
			s.Headers(okTrailer, true)
		}
	}}
	u.client = &handler{
		headers: func(s *Stream, _ []hpack.HeaderField, end bool) {
			if end {
				s.Finish()
				u.done <- struct{}{}
			}
		},
		data: func(s *Stream, data []byte, _ bool) { s.Consumed(len(data)) },
	}
	pool := new(recycling)
	u.server.conn = NewServer(far, Config{Handler: u.server, Pool: pool})
	u.client.conn = NewClient(near, Config{Handler: u.client, Pool: pool})
	for _, c := range []*Conn{u.server.conn, u.client.conn} {
		u.ends.Go(func() { _ = c.Serve() })
	}
	return u
}

func (u *unary) call() {
	u.client.conn.Open(nil, request, false).Data(true, u.msg[:5], u.msg[5:])
	u.client.conn.Flush()
	<-u.done
}

func (u *unary) close() {
	u.client.conn.Close()
	u.server.conn.Close()
	u.ends.Wait()
}

// BenchmarkUnary counts what both sides of a call cost.
func BenchmarkUnary(b *testing.B) {
	for name, size := range map[string]int{"100B": 100, "10KiB": 10 << 10} {
		b.Run(name, func(b *testing.B) {
			u := newUnary(b, size)
			b.SetBytes(int64(2 * size))
			b.ReportAllocs()
			for b.Loop() {
				u.call()
			}
			b.StopTimer()
			u.close()
		})
	}
}

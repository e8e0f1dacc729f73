package http2conn

import (
	"sync"
	"testing"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"
)

// recycling is a pool as package proxy's: it costs no allocation where it is in balance, and clears what is given back.
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

// BenchmarkUnary is a call of a message each way over loopback: header fields, data and a trailer. It counts what both sides cost.
func BenchmarkUnary(b *testing.B) {
	for name, size := range map[string]int{"100B": 100, "10KiB": 10 << 10} {
		b.Run(name, func(b *testing.B) {
			near, far := loopback(b)
			done := make(chan struct{}, 1)
			header := fields(":status", "200", "content-type", "application/grpc")
			msg := pattern(size)
			server := &handler{data: func(s *Stream, data []byte, end bool) {
				if s.Consumed(len(data)); end {
					s.Headers(header, false)
					s.Data(false, msg[:5], msg[5:])
					s.Headers(okTrailer, true)
				}
			}}
			client := &handler{
				headers: func(s *Stream, _ []hpack.HeaderField, end bool) {
					if end {
						s.Finish()
						done <- struct{}{}
					}
				},
				data: func(s *Stream, data []byte, _ bool) { s.Consumed(len(data)) },
			}
			pool := new(recycling)
			server.conn = NewServer(far, Config{Handler: server, Pool: pool})
			client.conn = NewClient(near, Config{Handler: client, Pool: pool})
			var ends sync.WaitGroup
			for _, c := range []*Conn{server.conn, client.conn} {
				ends.Go(func() { _ = c.Serve() })
			}
			b.SetBytes(int64(2 * size))
			b.ReportAllocs()
			for b.Loop() {
				client.conn.Open(nil, request, false).Data(true, msg[:5], msg[5:])
				client.conn.Flush()
				<-done
			}
			b.StopTimer()
			client.conn.Close()
			server.conn.Close()
			ends.Wait()
		})
	}
}

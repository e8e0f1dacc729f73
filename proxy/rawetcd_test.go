package proxy

import (
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/h2"
)

// rawEtcd is an etcd, for one connection, that begins to answer each call and says no more, for others to embed.
type rawEtcd struct{ conn *h2.Conn }

func (r *rawEtcd) Headers(s *h2.Stream, _ []hpack.HeaderField, _ bool) {
	s.Headers([]hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: contentType}}, false)
}
func (r *rawEtcd) Data(*h2.Stream, []byte, bool)   {}
func (r *rawEtcd) Reset(*h2.Stream, http2.ErrCode) {}
func (r *rawEtcd) Sent(*h2.Stream)                 {}
func (r *rawEtcd) Greeted()                        {}
func (r *rawEtcd) Leaving()                        {}
func (r *rawEtcd) Idle()                           { r.conn.Flush() }

// serveH2 serves what handler makes of a rawEtcd, on loopback.
func serveH2(t *testing.T, handler func(*rawEtcd) h2.Handler) (address string) {
	t.Helper()
	l := listenLoopback(t)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r := new(rawEtcd)
			r.conn = h2.NewServer(conn, h2.Config{Handler: handler(r), Pool: buffers})
			go func() { _ = r.conn.Serve() }()
		}
	}()
	return l.Addr().String()
}

package proxy

import (
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// rawEtcd is an etcd, for one connection, that begins to answer each call and says no more, for others to embed.
type rawEtcd struct{ conn *http2conn.Conn }

func (r *rawEtcd) Headers(s *http2conn.Stream, _ []hpack.HeaderField, _ bool) {
	s.Headers([]hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: contentType}}, false)
}
func (r *rawEtcd) Data(*http2conn.Stream, []byte, bool)   {}
func (r *rawEtcd) Reset(*http2conn.Stream, http2.ErrCode) {}
func (r *rawEtcd) Writable(*http2conn.Stream)             {}
func (r *rawEtcd) SettingsReceived()                      {}
func (r *rawEtcd) GoAwayReceived()                        {}
func (r *rawEtcd) FlushNeeded()                           { r.conn.Flush() }

// serveH2 serves what handler makes of a rawEtcd, on loopback.
func serveH2(t *testing.T, handler func(*rawEtcd) http2conn.Handler) (address string) {
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
			r.conn = http2conn.NewServer(conn, http2conn.Config{Handler: handler(r), Pool: buffers})
			go func() { _ = r.conn.Serve() }()
		}
	}()
	return l.Addr().String()
}

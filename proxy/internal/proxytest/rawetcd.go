package proxytest

import (
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// RawEtcd is an etcd, for one connection, that begins to answer each call and says no more, for
// others to embed.
type RawEtcd struct{ Conn *http2conn.Conn }

func (r *RawEtcd) Headers(s *http2conn.Stream, _ []hpack.HeaderField, _ bool) {
	s.Headers([]hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: rpc.ContentType}}, false)
}
func (r *RawEtcd) Data(*http2conn.Stream, []byte, bool)   {}
func (r *RawEtcd) Reset(*http2conn.Stream, http2.ErrCode) {}
func (r *RawEtcd) Writable(*http2conn.Stream)             {}
func (r *RawEtcd) SettingsReceived()                      {}
func (r *RawEtcd) GoAwayReceived()                        {}
func (r *RawEtcd) FlushNeeded()                           { r.Conn.Flush() }

// ServeH2 serves what handler makes of a rawEtcd, on loopback.
func ServeH2(t testing.TB, handler func(*RawEtcd) http2conn.Handler) (address string) {
	t.Helper()
	l := ListenLoopback(t)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r := new(RawEtcd)
			r.Conn = http2conn.NewServer(conn, http2conn.Config{Handler: handler(r), Pool: rpc.Buffers})
			go func() { _ = r.Conn.Serve() }()
		}
	}()
	return l.Addr().String()
}

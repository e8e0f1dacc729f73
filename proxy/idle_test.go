package proxy

import (
	"net"
	"testing"

	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// TestConnectionThatLeaves: a call that comes just as the connection to the reference engine closes, for want of calls, gets another.
func TestConnectionThatLeaves(t *testing.T) {
	connect := func() *http2conn.Conn {
		near, far := net.Pipe()
		t.Cleanup(func() { far.Close() })
		conn := http2conn.NewClient(near, http2conn.Config{Handler: &upside{}, Pool: mem.NopBufferPool{}})
		t.Cleanup(conn.Close)
		return conn
	}
	left, takes := connect(), connect()
	left.Close()
	all := []*http2conn.Conn{left, takes, nil}
	next := func() (c *http2conn.Conn) {
		c, all = all[0], all[1:]
		return c
	}
	st := new(fstream)
	if st.openOnFirst(next); st.up == nil || !st.local || len(all) != 1 || len(takes.Streams()) != 1 {
		t.Errorf("the call goes on: %t, with %d connections untried", st.up != nil, len(all))
	}
	st = new(fstream)
	if st.openOnFirst(next); st.up != nil || st.local {
		t.Error("a call goes on to no connection")
	}
}

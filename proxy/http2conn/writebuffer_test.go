package http2conn

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// sockets returns both ends of a connection whose buffers are small.
func sockets(t *testing.T) (near, far net.Conn) {
	return ends(t, "unix", filepath.Join(t.TempDir(), "s"))
}

// TestPairOfSmallBuffers moves more than what lies between two connections holds, both ways at
// once: each goes on reading while the other does not.
func TestPairOfSmallBuffers(t *testing.T) {
	certified := httptest.NewTLSServer(nil)
	defer certified.Close()
	trusting := certified.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	trusting.ServerName = "example.com"
	for name, over := range map[string]func(conn net.Conn, server bool) (top net.Conn, cfg Config){
		"plain":               func(conn net.Conn, _ bool) (net.Conn, Config) { return conn, Config{Plaintext: true} },
		"plain, in one piece": func(conn net.Conn, _ bool) (net.Conn, Config) { return conn, Config{} },
		"TLS": func(conn net.Conn, server bool) (net.Conn, Config) {
			outlet := writebuffer.New(conn)
			if server {
				return tls.Server(outlet, certified.TLS), Config{WriteBuffer: outlet}
			}
			return tls.Client(outlet, trusting), Config{WriteBuffer: outlet}
		},
		"not the system's": func(conn net.Conn, _ bool) (net.Conn, Config) {
			return struct{ net.Conn }{conn}, Config{Plaintext: true}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			near, far := sockets(t)
			client, server := caller(), echo()
			for _, h := range []*handler{server, client} {
				conn, pool := near, new(ledger)
				if h == server {
					conn = far
				}
				top, cfg := over(conn, h == server)
				cfg.Handler, cfg.Pool = h, pool
				if h == server {
					serving(t, h, pool, NewServer(top, cfg))
				} else {
					serving(t, h, pool, NewClient(top, cfg))
				}
			}
			var all sync.WaitGroup
			for i := range 6 {
				all.Go(func() {
					n := connWindow + i
					s, a := open(t, client.conn, false)
					if i%2 == 0 {
						s.Data(true, nil, pattern(n))
					} else {
						s.Buffers(true, nil, client.conn.cfg.Pool.(*ledger).body(n, 5000))
					}
					client.conn.Flush()
					wait(t, a.done, fmt.Sprint("answer of ", n, " bytes"))
					same(t, "answer", a.body, pattern(n))
				})
			}
			all.Wait()
		})
	}
}

// TestPeerThatOnlySends is not heard any more once as much waits for it as may, and hears
// everything as soon as it reads.
func TestPeerThatOnlySends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		release := p.pause()
		var sent atomic.Int64
		stop := make(chan struct{})
		sending := make(chan struct{})
		go func() {
			defer close(sending)
			for {
				select {
				case <-stop:
					return
				default:
					p.WriteSettings() // each is to be acknowledged
					sent.Add(1)
				}
			}
		}()
		synctest.Wait() // it cannot write any more
		close(stop)
		h.conn.mu.Lock()
		waits := h.conn.out.size() + h.conn.writeBuffer.Size()
		h.conn.mu.Unlock()
		if waits < readPauseLimit || waits > readPauseLimit+maxInput {
			t.Errorf("%d bytes wait, want a few more than %d", waits, readPauseLimit)
		}
		release()
		<-sending
		synctest.Wait()
		if got := p.says(t); len(got) != int(sent.Load()) || got[0] != "SETTINGS ack" {
			t.Errorf("%d are acknowledged of %d, the first by %q", len(got), sent.Load(), got[0])
		}
	})
}

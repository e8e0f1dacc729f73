package http2conn

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestDetach: a connection that is detached holds nothing but its socket, and the client notices when
// it sends something.
func TestDetach(t *testing.T) {
	for name, end := range map[string]func(p *peer, d *Detached){
		"the client sends":  func(p *peer, _ *Detached) { p.headers(3, true, request) },
		"the server drains": func(_ *peer, d *Detached) { d.End() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := &handler{}
				p := serveOne(t, h, Config{HandshakeTimeout: time.Minute, KeepaliveTime: time.Hour})
				p.begin(t, h, 1, true).Headers(fields(":status", "200"), true)
				h.conn.Flush()
				p.expect(t, "HEADERS 1 :status=200 end")
				h.conn.Detach()
				if err := <-p.served; err == nil {
					t.Error("no reason")
				}
				if n := p.pool.out(); n != 0 {
					t.Errorf("%d buffers are held", n)
				}
				d := h.conn.Detached()
				if d == nil {
					t.Fatal("the connection was not detached")
				}
				go d.Wait()
				time.Sleep(24 * time.Hour)
				p.expect(t)
				go end(p, d) // nobody reads what the client sends before the socket is closed
				p.expect(t, `GOAWAY 1 NO_ERROR "graceful_stop"`)
				time.Sleep(2 * lingerTimeout)
				p.expect(t, "closed")
			})
		})
	}
}

// TestDetachInTheHandshake: the deadline of the handshake does not replace the one that ends the read.
func TestDetachInTheHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		cfg := Config{HandshakeTimeout: time.Minute}
		p, far := newPeer(t, &cfg, h)
		h.conn = NewServer(far, cfg)
		h.conn.Detach()
		begun := time.Now()
		p.run(t, h.conn)
		<-p.served
		if waited := time.Since(begun); waited > time.Second {
			t.Errorf("the connection was served for %v", waited)
		}
	})
}

// TestDetachWithStreams: a connection with open streams is closed.
func TestDetachWithStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		p.begin(t, h, 1, false)
		h.conn.Detach()
		p.expect(t, `GOAWAY 1 NO_ERROR "graceful_stop"`)
		time.Sleep(2 * lingerTimeout)
		p.expect(t, "closed")
		if h.conn.Detached() != nil {
			t.Error("the connection was detached")
		}
	})
}

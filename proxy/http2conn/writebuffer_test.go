package http2conn

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

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
			clientConn, clientConfig := over(near, false)
			serverConn, serverConfig := over(far, true)
			if secure, ok := serverConn.(*tls.Conn); ok {
				shaken := make(chan error, 1)
				go func() { shaken <- secure.Handshake() }()
				if err := errors.Join(clientConn.(*tls.Conn).Handshake(), <-shaken); err != nil {
					t.Fatal(err)
				}
			}
			clientConfig.Handler, clientConfig.Pool = client, new(ledger)
			serverConfig.Handler, serverConfig.Pool = server, new(ledger)
			serving(t, server, serverConfig.Pool.(*ledger), NewServer(serverConn, serverConfig))
			serving(t, client, clientConfig.Pool.(*ledger), NewClient(clientConn, clientConfig))
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

// corked collects what is written to a connection until it is uncorked.
type corked struct {
	net.Conn
	cork    bool
	written []byte
}

// Write implements net.Conn.
func (c *corked) Write(b []byte) (int, error) {
	if !c.cork {
		return c.Conn.Write(b)
	}
	c.written = append(c.written, b...)
	return len(b), nil
}

// TestRecordsAreHandledTogether: TLS records that arrive at once are answered in one write, though
// TLS returns them one by one. etcd's server sends a record for each frame.
func TestRecordsAreHandledTogether(t *testing.T) {
	const records = 20
	certified := httptest.NewTLSServer(nil)
	defer certified.Close()
	trusting := certified.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	trusting.ServerName = "example.com"
	near, far := loopback(t)
	wire := &corked{Conn: near}
	client, buffer := tls.Client(wire, trusting), writebuffer.New(far)
	server := tls.Server(buffer, certified.TLS)
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }()
	if err := errors.Join(client.Handshake(), <-shaken); err != nil {
		t.Fatal(err)
	}
	var reads atomic.Int64
	h, pool := new(handler), new(ledger)
	serving(t, h, pool, NewServer(server, Config{
		Handler: h, Pool: pool, WriteBuffer: buffer, BeforeRead: func() { reads.Add(1) },
	}))
	if err := client.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(client, client)
	// Each exchange is over when all its SETTINGS frames are acknowledged.
	exchange := func(frames int) {
		t.Helper()
		for range frames {
			if err := framer.WriteSettings(); err != nil {
				t.Fatal(err)
			}
		}
		if wire.cork = false; len(wire.written) > 0 {
			if _, err := wire.Write(wire.written); err != nil {
				t.Fatal(err)
			}
		}
		for frames > 0 {
			f, err := framer.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if f, ok := f.(*http2.SettingsFrame); ok && f.IsAck() {
				frames--
			}
		}
	}
	exchange(1)
	before := reads.Load()
	wire.cork = true
	exchange(records)
	// Each write is followed by a read, and a large batch may arrive in several parts.
	if got := reads.Load() - before; got > records/4 {
		t.Errorf("%d records were answered in up to %d writes", records, got)
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

package http2conn

import (
	"errors"
	"io"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// greeting is how long peers may take over their first words here.
const greeting = 10 * time.Second

// TestFirstWords: a peer that does not begin as HTTP/2 does is left at once, and one that does not
// begin in time.
func TestFirstWords(t *testing.T) {
	told := map[string]string{ // the others are gone, or do not listen
		"another protocol":  `GOAWAY 0 PROTOCOL_ERROR "not the client preface of HTTP/2"`,
		"no settings":       `GOAWAY 0 PROTOCOL_ERROR "the first frame is not SETTINGS"`,
		"a call":            `GOAWAY 1 PROTOCOL_ERROR "the first frame is not SETTINGS"`,
		"a call that fails": `GOAWAY 1 PROTOCOL_ERROR "the first frame is not SETTINGS"`,
	}
	for name, say := range map[string]func(p *peer){
		"another protocol": func(p *peer) { io.WriteString(p.conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n") },
		"a part of it":     func(p *peer) { io.WriteString(p.conn, http2.ClientPreface[:10]); p.conn.Close() },
		"no settings":      func(p *peer) { io.WriteString(p.conn, http2.ClientPreface); p.WritePing(false, [8]byte{}) },
		"a call":           func(p *peer) { io.WriteString(p.conn, http2.ClientPreface); p.headers(1, true, request) },
		"a call that fails": func(p *peer) {
			io.WriteString(p.conn, http2.ClientPreface)
			p.headers(1, true, fields("UPPER", "case"))
		},
		"silence": func(*peer) { time.Sleep(greeting) },
		"late settings": func(p *peer) {
			time.Sleep(greeting - 1)
			io.WriteString(p.conn, http2.ClientPreface)
			time.Sleep(time.Nanosecond)
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{headers: func(*Stream, []hpack.HeaderField, bool) { t.Errorf("%s: a stream begins", name) }}
			cfg := Config{HandshakeTimeout: greeting}
			p, far := newPeer(t, &cfg, h)
			h.conn = NewServer(far, cfg)
			p.run(t, h.conn)
			p.expect(t, "SETTINGS MAX_CONCURRENT_STREAMS=32768 MAX_HEADER_LIST_SIZE=65536", "WINDOW_UPDATE 4128769")
			say(p)
			if why := told[name]; why != "" {
				p.expect(t, why)
				time.Sleep(lingerTimeout)
			}
			p.expect(t, "closed")
			if err := <-p.served; err == nil {
				t.Errorf("%s: Serve says nothing", name)
			}
		})
	}
}

// TestServerWithoutSettings: a client does not wait for them longer than for anything else.
func TestServerWithoutSettings(t *testing.T) {
	for name, say := range map[string]func(p *peer){
		"silence": func(*peer) { time.Sleep(greeting) },
		"a ping":  func(p *peer) { p.WritePing(false, [8]byte{}) },
		"garbage": func(p *peer) { io.WriteString(p.conn, "HTTP/1.1 400 Bad Request\r\n\r\n") },
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			cfg := Config{HandshakeTimeout: greeting}
			p, far := newPeer(t, &cfg, h)
			h.conn = NewClient(far, cfg)
			p.run(t, h.conn)
			p.says(t)
			say(p)
			p.expect(t, "closed")
			if err := <-p.served; err == nil || name == "silence" && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: Serve says %v", name, err)
			}
		})
	}
}

// TestNoDeadlineAfterSettings: who has said hello may be silent for ever.
func TestNoDeadlineAfterSettings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		time.Sleep(1000 * time.Hour)
		p.WritePing(false, [8]byte{'x'})
		p.expect(t, `PING ack "x"`)
	})
}

// TestCloseBeforeServe leaves nothing behind.
func TestCloseBeforeServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		cfg := Config{KeepaliveTime: time.Second, KeepaliveTimeout: time.Second, IdleTimeout: time.Second, PermitWithoutStream: true}
		p, far := newPeer(t, &cfg, h)
		h.conn = NewClient(far, cfg)
		h.conn.Close()
		p.run(t, h.conn)
		p.expect(t, "closed")
		if h.conn.Open(nil, request, true) != nil {
			t.Error("it takes a stream")
		}
	})
}

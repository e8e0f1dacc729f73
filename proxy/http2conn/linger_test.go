package http2conn

import (
	"bytes"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// TestLastAnswerArrives: a server that leaves does not close the connection under an answer that is
// on its way, which TCP would drop as soon as the client says something.
func TestLastAnswerArrives(t *testing.T) {
	near, far := loopback(t)
	defer near.Close()
	const size = 200_000
	// it takes what the client does not read yet
	if err := far.(*net.TCPConn).SetWriteBuffer(2 * size); err != nil {
		t.Fatal(err)
	}
	h, pool := &handler{}, new(ledger)
	began := make(chan *Stream, 1)
	h.headers = func(s *Stream, _ []hpack.HeaderField, _ bool) { began <- s }
	serving(t, h, pool, NewServer(far, Config{Handler: h, Pool: pool}))
	client := http2.NewFramer(near, near)
	io.WriteString(near, http2.ClientPreface)
	client.WriteSettings(windowOf(1 << 20))
	client.WriteWindowUpdate(0, 1<<20)
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range request {
		_ = enc.WriteField(f)
	}
	client.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true})
	s := wait(t, began, "stream")
	h.conn.GracefulShutdown()
	h.conn.Flush()
	client.WritePing(true, shutdownPing)
	next := func() http2.Frame {
		f, err := client.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	for told := false; !told; {
		f, ok := next().(*http2.GoAwayFrame)
		told = ok && f.LastStreamID == 1
	}
	s.Data(false, nil, pattern(size))
	s.Headers(okTrailer, true)
	h.conn.Flush()
	client.WriteWindowUpdate(0, 1)
	for got := 0; ; {
		switch f := next().(type) {
		case *http2.DataFrame:
			got += len(f.Data())
		case *http2.HeadersFrame:
			if got != size || !f.StreamEnded() {
				t.Errorf("%d bytes came, want %d", got, size)
			}
			return
		}
	}
}

// TestLinger: a client that has heard all there is has a moment to close the connection itself, in
// which nothing of it is heard.
func TestLinger(t *testing.T) {
	for name, last := range map[string]func(h *handler, p *peer){
		"leaving": func(h *handler, p *peer) {
			h.conn.GracefulShutdown()
			h.conn.Flush()
			p.WritePing(true, shutdownPing)
		},
		"a bad stream": func(_ *handler, p *peer) { p.headers(2, true, request) },
		"pings": func(_ *handler, p *peer) {
			for range maxPingStrikes + 2 {
				p.WritePing(false, [8]byte{})
			}
		},
	} {
		for _, closes := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				h := &handler{}
				p := serveOne(t, h, Config{MinPingInterval: time.Minute})
				last(h, p)
				h.headers = func(*Stream, []hpack.HeaderField, bool) { t.Errorf("%s: a stream begins", name) }
				p.says(t)
				p.headers(1, true, request)
				p.WritePing(false, [8]byte{})
				begun := time.Now()
				if closes {
					p.conn.Close()
				}
				if err := <-p.served; err == nil {
					t.Errorf("%s: Serve says nothing", name)
				}
				want := []string{"closed"}
				if got := p.says(t); len(got) != 1 || got[0] != want[0] {
					t.Errorf("%s: the peer was sent %q", name, got)
				}
				if took := time.Since(begun); closes && took > 0 || !closes && took != lingerTimeout {
					t.Errorf("%s: it took %v", name, took)
				}
			})
		}
	}
	synctest.Test(t, func(t *testing.T) { // unless it is closed
		h := &handler{}
		p := serveOne(t, h, Config{})
		h.conn.GracefulShutdown()
		h.conn.Flush()
		p.WritePing(true, shutdownPing)
		p.says(t)
		h.conn.Close()
		p.expect(t, "closed")
	})
}

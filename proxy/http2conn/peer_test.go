package http2conn

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// peer is the other side of a Conn, as bare frames. It lives in a bubble of synctest: what it was
// sent is known when all is quiet.
type peer struct {
	*http2.Framer // what it says
	conn          net.Conn
	pool          *ledger
	served        chan error // what Serve has said
	enc           *hpack.Encoder
	block         bytes.Buffer

	mu   sync.Mutex
	got  []string
	data map[uint32][]byte
	hold chan struct{} // if not nil, nothing more is read before it closes
}

// serveOne starts a Conn that serves, and is its client, which has sent its settings.
func serveOne(t *testing.T, h *handler, cfg Config, settings ...http2.Setting) *peer {
	t.Helper()
	p, far := newPeer(t, &cfg, h)
	h.conn = NewServer(far, cfg)
	p.run(t, h.conn)
	p.preface(t)
	p.WriteSettings(settings...)
	p.says(t)
	return p
}

// dialOne starts a Conn of a client, and is its server, which has sent its settings.
func dialOne(t *testing.T, h *handler, cfg Config, settings ...http2.Setting) *peer {
	t.Helper()
	p, far := newPeer(t, &cfg, h)
	h.conn = NewClient(far, cfg)
	p.run(t, h.conn)
	p.WriteSettings(settings...)
	if got := p.says(t); len(got) < 2 || got[0] != "preface" || got[1] != "SETTINGS ENABLE_PUSH=0 INITIAL_WINDOW_SIZE=524288" {
		t.Fatalf("a client begins with %q", got)
	}
	return p
}

func newPeer(t *testing.T, cfg *Config, h *handler) (p *peer, far net.Conn) {
	near, far := net.Pipe()
	p = &peer{Framer: http2.NewFramer(near, nil), conn: near, pool: new(ledger), served: make(chan error, 1), data: make(map[uint32][]byte)}
	p.AllowIllegalWrites = true
	p.enc = hpack.NewEncoder(&p.block)
	cfg.Handler, cfg.Pool = h, p.pool
	cfg.Plaintext = h.vectors
	t.Cleanup(func() {
		near.Close()
		synctest.Wait()
		h.conn.Close()
		p.pool.check(t)
	})
	return p, far
}

// run serves the Conn, and notes what it says.
func (p *peer) run(t *testing.T, c *Conn) {
	read := http2.NewFramer(nil, readerFunc(p.read))
	read.SetMaxReadFrameSize(1 << 20)
	read.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	go func() { p.served <- c.Serve() }()
	go func() {
		if !c.server {
			var b [len(http2.ClientPreface)]byte
			if _, err := io.ReadFull(p.conn, b[:]); err == nil && string(b[:]) == http2.ClientPreface {
				p.note("preface")
			}
		}
		for {
			f, err := read.ReadFrame()
			if err != nil {
				p.note("closed")
				return
			}
			p.note(p.told(f))
		}
	}()
	synctest.Wait()
}

func (p *peer) preface(t *testing.T) {
	t.Helper()
	if _, err := io.WriteString(p.conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

func (p *peer) read(b []byte) (int, error) {
	n, err := p.conn.Read(b)
	p.mu.Lock()
	hold := p.hold
	p.mu.Unlock()
	if hold != nil {
		<-hold
	}
	return n, err
}

// pause has the peer read no more than the head of the next frame, until it is released.
func (p *peer) pause() (release func()) {
	hold := make(chan struct{})
	set := func(c chan struct{}) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.hold = c
	}
	set(hold)
	return func() { set(nil); close(hold) }
}

func (p *peer) note(s string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.got = append(p.got, s)
}

// told describes a frame.
func (p *peer) told(f http2.Frame) string {
	h := f.Header()
	s := fmt.Sprint(h.Type, " ", h.StreamID)
	if h.StreamID == 0 {
		s = h.Type.String()
	}
	switch f := f.(type) {
	case *http2.DataFrame:
		s += fmt.Sprint(" ", len(f.Data()))
		p.mu.Lock()
		p.data[h.StreamID] = append(p.data[h.StreamID], f.Data()...)
		p.mu.Unlock()
		if f.StreamEnded() {
			s += " end"
		}
	case *http2.MetaHeadersFrame:
		for _, f := range f.Fields {
			s += fmt.Sprint(" ", f.Name, "=", f.Value)
		}
		if f.StreamEnded() {
			s += " end"
		}
	case *http2.SettingsFrame:
		if f.IsAck() {
			s += " ack"
		}
		_ = f.ForeachSetting(func(set http2.Setting) error { s += fmt.Sprint(" ", set.ID, "=", set.Val); return nil })
	case *http2.PingFrame:
		if f.IsAck() {
			s += " ack"
		}
		s += fmt.Sprintf(" %q", strings.Trim(string(f.Data[:]), "\x00"))
	case *http2.RSTStreamFrame:
		s += fmt.Sprint(" ", f.ErrCode)
	case *http2.GoAwayFrame:
		s += fmt.Sprintf(" %d %v %q", f.LastStreamID, f.ErrCode, f.DebugData())
	case *http2.WindowUpdateFrame:
		s += fmt.Sprint(" ", f.Increment)
	}
	return s
}

// says waits until all is quiet, and returns what the Conn has said since the last time.
func (p *peer) says(t *testing.T) []string {
	t.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	got := p.got
	p.got = nil
	return got
}

// expect fails unless the Conn has said want, and no more.
func (p *peer) expect(t *testing.T, want ...string) {
	t.Helper()
	if got := p.says(t); !slices.Equal(got, want) {
		t.Fatalf("the peer was sent\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// took returns what a stream has brought so far.
func (p *peer) took(id uint32) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.data[id])
}

// brought is how many bytes that were.
func (p *peer) brought(id uint32) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.data[id])
}

// headers sends header fields in one frame.
func (p *peer) headers(id uint32, end bool, all []hpack.HeaderField) {
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.coded(all), EndStream: end, EndHeaders: true})
}

// coded is a block of header fields. It is good until the next.
func (p *peer) coded(all []hpack.HeaderField) []byte {
	p.block.Reset()
	for _, f := range all {
		_ = p.enc.WriteField(f)
	}
	return p.block.Bytes()
}

// begin begins a stream, of which it returns the other side.
func (p *peer) begin(t *testing.T, h *handler, id uint32, end bool) *Stream {
	t.Helper()
	before := h.headers
	began := make(chan *Stream, 1)
	h.headers = func(s *Stream, fields []hpack.HeaderField, end bool) {
		if before != nil {
			before(s, fields, end)
		}
		began <- s
	}
	p.headers(id, end, request)
	s := <-began
	synctest.Wait() // the handler is not under way any more
	h.headers = before
	return s
}

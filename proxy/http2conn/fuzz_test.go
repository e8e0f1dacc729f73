package http2conn

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// tape is a connection on which all that a peer says is there from the beginning, to be read in
// pieces of at most each, and which takes everything.
type tape struct {
	net.Conn
	in   []byte
	each int
	out  bytes.Buffer
}

func (c *tape) Read(b []byte) (int, error) {
	if len(c.in) == 0 {
		return 0, io.EOF
	}
	n := copy(b, c.in[:min(len(c.in), c.each)])
	c.in = c.in[n:]
	return n, nil
}

func (c *tape) Write(b []byte) (int, error)        { return c.out.Write(b) }
func (c *tape) Close() error                       { return nil }
func (c *tape) SetReadDeadline(time.Time) error    { return nil }
func (c *tape) SetWriteDeadline(t time.Time) error { return nil }

// strict passes on what a handler hears, and fails where a stream goes on after its end.
type strict struct {
	Handler
	t     *testing.T
	ended map[*Stream]bool
}

func (h *strict) see(s *Stream, end bool) {
	if h.ended[s] {
		h.t.Fatalf("the handler hears of stream %d after its end", s.id)
	}
	h.ended[s] = end
}

func (h *strict) Headers(s *Stream, fields []hpack.HeaderField, end bool) {
	h.see(s, end)
	h.Handler.Headers(s, fields, end)
}

func (h *strict) Data(s *Stream, data []byte, end bool) {
	h.see(s, end)
	h.Handler.Data(s, data, end)
}

func (h *strict) Reset(s *Stream, code http2.ErrCode) { h.Handler.Reset(s, code) }

// checkSaid fails unless said is whole frames of the protocol, that do not go on with a stream
// after its end.
func checkSaid(t *testing.T, said []byte) {
	t.Helper()
	r := bytes.NewReader(said)
	f := http2.NewFramer(nil, r)
	f.SetMaxReadFrameSize(flushLimit / 2)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	ended := make(map[uint32]bool)
	for {
		frame, err := f.ReadFrame()
		if errors.Is(err, io.EOF) && r.Len() == 0 {
			return
		}
		if err != nil {
			t.Fatalf("what was said is not HTTP/2: %v", err)
		}
		id, end := frame.Header().StreamID, false
		switch frame := frame.(type) {
		case *http2.DataFrame:
			end = frame.StreamEnded()
		case *http2.MetaHeadersFrame:
			end = frame.StreamEnded()
		case *http2.RSTStreamFrame:
			// may follow the end, and answers headers that begin no stream, after which grpc-go
			// takes better ones
			_, began := ended[id]
			ended[id] = began
			continue
		default:
			continue
		}
		if ended[id] {
			t.Fatalf("stream %d goes on after its end: %v", id, frame)
		}
		ended[id] = end
	}
}

// framesOf is what write says.
func framesOf(write func(f *http2.Framer, headers func(id uint32, end bool, all []hpack.HeaderField))) []byte {
	var out, block bytes.Buffer
	f := http2.NewFramer(&out, nil)
	f.AllowIllegalWrites = true
	enc := hpack.NewEncoder(&block)
	write(f, func(id uint32, end bool, all []hpack.HeaderField) {
		block.Reset()
		for _, f := range all {
			_ = enc.WriteField(f)
		}
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndStream: end, EndHeaders: true})
	})
	return out.Bytes()
}

// seed adds conversations, whose first fields are those of first.
func seed(f *testing.F, first []hpack.HeaderField) {
	for _, write := range []func(f *http2.Framer, headers func(uint32, bool, []hpack.HeaderField)){
		func(f *http2.Framer, headers func(uint32, bool, []hpack.HeaderField)) {
			headers(1, false, first)
			f.WriteData(1, false, []byte("data"))
			f.WriteDataPadded(1, true, []byte("data"), make([]byte, 7))
			headers(3, true, okTrailer)
		},
		func(f *http2.Framer, headers func(uint32, bool, []hpack.HeaderField)) {
			f.WriteSettings(windowOf(0), http2.Setting{ID: http2.SettingMaxFrameSize, Val: 20_000}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
			headers(1, false, first)
			headers(3, false, first)
			f.WriteData(1, false, pattern(300))
			f.WriteData(3, true, pattern(300))
			f.WriteSettings(windowOf(3), http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
			f.WriteWindowUpdate(3, 100)
			f.WriteWindowUpdate(1, 1<<31-1)
			f.WriteWindowUpdate(0, 1<<31-1)
			headers(1, true, okTrailer)
			f.WriteRSTStream(3, http2.ErrCodeCancel)
			f.WriteSettingsAck()
		},
		func(f *http2.Framer, headers func(uint32, bool, []hpack.HeaderField)) {
			headers(1, true, first)
			f.WritePing(true, shutdownPing)
			f.WritePing(false, [8]byte{1, 2})
			f.WritePing(false, [8]byte{1, 2})
			f.WritePing(false, [8]byte{1, 2})
			f.WriteGoAway(1, http2.ErrCodeNo, []byte("bye"))
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 5, BlockFragment: []byte{0x82}})
			f.WriteContinuation(5, false, []byte{0x86})
			f.WriteContinuation(5, true, []byte{0x84})
			f.WritePriority(5, http2.PriorityParam{StreamDep: 1, Weight: 3})
			f.WriteRawFrame(0x77, 1, 1, []byte("unknown"))
			f.WriteWindowUpdate(1, 0)
			f.WriteData(7, true, nil)
			headers(2, true, first)
		},
	} {
		said := framesOf(write)
		f.Add(said, uint16(1<<15), false)
		f.Add(said, uint16(3), true)
	}
}

// FuzzServer: whatever a client says, in whatever pieces, nothing panics, what is answered is
// HTTP/2, streams end once, and all buffers are given back.
func FuzzServer(f *testing.F) {
	seed(f, request)
	f.Fuzz(func(t *testing.T, said []byte, each uint16, leaves bool) {
		settings := framesOf(func(f *http2.Framer, _ func(uint32, bool, []hpack.HeaderField)) { f.WriteSettings() })
		conn := &tape{in: append(append([]byte(http2.ClientPreface), settings...), said...), each: int(each) + 1}
		h, pool := echo(), new(ledger)
		c := NewServer(conn, Config{Handler: &strict{Handler: h, t: t, ended: make(map[*Stream]bool)}, Pool: pool, MinPingInterval: time.Hour})
		if h.conn = c; leaves {
			c.GracefulShutdown()
		}
		if err := c.Serve(); err == nil {
			t.Fatal("Serve says nothing")
		}
		pool.check(t)
		checkSaid(t, conn.out.Bytes())
	})
}

// FuzzClient: the same, whatever a server says.
func FuzzClient(f *testing.F) {
	seed(f, fields(":status", "200"))
	f.Fuzz(func(t *testing.T, said []byte, each uint16, half bool) {
		settings := framesOf(func(f *http2.Framer, _ func(uint32, bool, []hpack.HeaderField)) { f.WriteSettings() })
		conn := &tape{in: append(settings, said...), each: int(each) + 1}
		h, pool := caller(), new(ledger)
		c := NewClient(conn, Config{Handler: &strict{Handler: h, t: t, ended: make(map[*Stream]bool)}, Pool: pool})
		h.conn = c
		for i := range 4 {
			s := c.Open(&answer{done: make(chan struct{})}, request, false)
			s.Buffers(i%2 == 0, pattern(5), pool.body(20_000, 3000))
			if half {
				s.Headers(okTrailer, true)
			}
		}
		if err := c.Serve(); err == nil {
			t.Fatal("Serve says nothing")
		}
		pool.check(t)
		out, ok := bytes.CutPrefix(conn.out.Bytes(), []byte(http2.ClientPreface))
		if !ok && conn.out.Len() > 0 {
			t.Fatal("it does not begin with the preface")
		}
		checkSaid(t, out)
	})
}

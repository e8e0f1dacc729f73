package proxytest

import (
	"bytes"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Attempt is one call as frames: whatever a client may make of it.
type Attempt struct {
	Fields []hpack.HeaderField
	bare   bool // the end is in the headers
	Frames [][]byte
	Padded []bool
	Reset  bool // in place of an end
	Open   bool // no end comes
}

// reply is what comes of it.
type reply struct {
	Data    []byte
	Trailer []string
	Reset   string
}

// Talker speaks HTTP/2 word for word.
type Talker struct {
	*http2.Framer
	conn net.Conn
	next uint32
	enc  *hpack.Encoder
	buf  *bytes.Buffer
}

func NewTalker(t *testing.T, address string) *Talker {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return NewTalkerOn(t, conn)
}

func NewTalkerOn(t *testing.T, conn net.Conn) *Talker {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	c := &Talker{Framer: http2.NewFramer(conn, conn), conn: conn, next: 1, buf: new(bytes.Buffer)}
	c.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.enc = hpack.NewEncoder(c.buf)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteWindowUpdate(0, 1<<30); err != nil {
		t.Fatal(err)
	}
	return c
}

// Try makes the attempt and returns what comes of it.
func (c *Talker) Try(t *testing.T, a Attempt) reply {
	t.Helper()
	id := c.next
	c.next += 2
	c.buf.Reset()
	for _, f := range a.Fields {
		_ = c.enc.WriteField(f)
	}
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(c.conn.SetDeadline(time.Now().Add(Patience)))
	check(c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: c.buf.Bytes(), EndHeaders: true, EndStream: a.bare}))
	for i, f := range a.Frames {
		end := i == len(a.Frames)-1 && !a.bare && !a.Reset && !a.Open
		if a.Padded[i] {
			check(c.WriteDataPadded(id, end, f, make([]byte, 1+i%200)))
		} else {
			check(c.WriteData(id, end, f))
		}
	}
	if a.Reset {
		check(c.WriteRSTStream(id, http2.ErrCodeCancel))
		return reply{Reset: "by the client"}
	}
	var got reply
	for {
		f, err := c.ReadFrame()
		if err != nil {
			t.Fatalf("%v: %d frames, open %t, bare %t, %v", err, len(a.Frames), a.Open, a.bare, a.Fields)
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				check(c.WriteSettingsAck())
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				check(c.WritePing(true, f.Data))
			}
		case *http2.DataFrame:
			if f.StreamID == id {
				if got.Data = append(got.Data, f.Data()...); f.StreamEnded() { // of HTTP alone
					return got
				}
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id && f.ErrCode != http2.ErrCodeNo {
				got.Reset = f.ErrCode.String()
				return got
			}
		case *http2.MetaHeadersFrame:
			if f.StreamID == id && f.StreamEnded() {
				for _, h := range f.Fields {
					if strings.HasPrefix(h.Name, "grpc-") {
						got.Trailer = append(got.Trailer, h.Name+": "+h.Value)
					}
				}
				slices.Sort(got.Trailer)
				return got
			}
		}
	}
}

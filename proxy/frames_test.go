package proxy

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// framePeer is a client or an etcd that sends prepared frames and reads no more of the other side's
// frames than it must. It allocates nothing for a call, so that what a test counts is the proxy's.
type framePeer struct {
	conn     net.Conn
	in, out  []byte
	received int // bytes of data since the last WINDOW_UPDATE
	handle   func(f frame)
}

// frame is a frame that a framePeer has received.
type frame struct {
	kind    http2.FrameType
	flags   http2.Flags
	id      uint32
	payload []byte
}

func (f *frame) ends() bool {
	return (f.kind == http2.FrameData || f.kind == http2.FrameHeaders) && f.flags.Has(http2.FlagDataEndStream)
}

const peerBuffer = 256 << 10

func newFramePeer(conn net.Conn) *framePeer {
	return &framePeer{conn: conn, in: make([]byte, peerBuffer), out: make([]byte, 0, peerBuffer)}
}

// appendFrame appends a frame to b.
func appendFrame(b []byte, kind http2.FrameType, flags http2.Flags, id uint32, payload ...[]byte) []byte {
	n := 0
	for _, p := range payload {
		n += len(p)
	}
	b = append(b, byte(n>>16), byte(n>>8), byte(n), byte(kind), byte(flags))
	b = binary.BigEndian.AppendUint32(b, id)
	for _, p := range payload {
		b = append(b, p...)
	}
	return b
}

// serve reads frames until the connection ends.
func (p *framePeer) serve() {
	for n := 0; ; {
		read, err := p.conn.Read(p.in[n:])
		if err != nil {
			return
		}
		n += read
		rest := p.in[:n]
		for len(rest) >= 9 {
			size := 9 + int(binary.BigEndian.Uint32(rest)>>8)
			if len(rest) < size {
				break
			}
			f := frame{http2.FrameType(rest[3]), http2.Flags(rest[4]), binary.BigEndian.Uint32(rest[5:]), rest[9:size]}
			p.answer(f)
			p.handle(f)
			rest = rest[size:]
		}
		n = copy(p.in, rest)
		if len(p.out) > 0 {
			if _, err := p.conn.Write(p.out); err != nil {
				return
			}
			p.out = p.out[:0]
		}
	}
}

// answer sends what HTTP/2 demands of a peer.
func (p *framePeer) answer(f frame) {
	switch {
	case f.kind == http2.FrameSettings && !f.flags.Has(http2.FlagSettingsAck):
		p.out = appendFrame(p.out, http2.FrameSettings, http2.FlagSettingsAck, 0)
	case f.kind == http2.FramePing && !f.flags.Has(http2.FlagPingAck):
		p.out = appendFrame(p.out, http2.FramePing, http2.FlagPingAck, 0, f.payload)
	case f.kind == http2.FrameData:
		if p.received += len(f.payload); p.received >= 16<<10 {
			var n [4]byte
			binary.BigEndian.PutUint32(n[:], uint32(p.received))
			p.out = appendFrame(p.out, http2.FrameWindowUpdate, 0, 0, n[:])
			p.received = 0
		}
	}
}

// blocks encodes header lists twice each, in turns: as they are sent first, and when they repeat.
func blocks(lists ...[]hpack.HeaderField) (first, then [][]byte) {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, all := range []*[][]byte{&first, &then} {
		for _, list := range lists {
			b.Reset()
			for _, f := range list {
				_ = e.WriteField(f)
			}
			*all = append(*all, bytes.Clone(b.Bytes()))
		}
	}
	return first, then
}

// serveFrames serves an etcd that responds to each call with a message, or with the request if it
// has none.
func serveFrames(t testing.TB, message []byte) (address string) {
	t.Helper()
	l := proxytest.ListenLoopback(t)
	t.Cleanup(func() { l.Close() })
	header := []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: rpc.ContentType}}
	trailer := []hpack.HeaderField{{Name: "grpc-status", Value: "0"}, {Name: "grpc-message", Value: ""}}
	first, then := blocks(header, trailer)
	message = append(rpc.Header(len(message)), message...)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p := newFramePeer(conn)
			next := first
			p.handle = func(f frame) {
				if !f.ends() {
					return
				}
				response := message
				if len(response) == rpc.HeaderLength {
					response = f.payload
				}
				p.out = appendFrame(p.out, http2.FrameHeaders, http2.FlagHeadersEndHeaders, f.id, next[0])
				p.out = appendFrame(p.out, http2.FrameData, 0, f.id, response)
				p.out = appendFrame(p.out, http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, f.id, next[1])
				next = then
			}
			p.out = appendFrame(p.out, http2.FrameSettings, 0, 0)
			go func() {
				if _, err := io.CopyN(io.Discard, conn, int64(len(http2.ClientPreface))); err == nil {
					p.serve()
				}
				conn.Close()
			}()
		}
	}()
	return l.Addr().String()
}

// frameClient is a client that makes the same call over and over.
type frameClient struct {
	*framePeer
	request     []byte // with gRPC's header
	first, then []byte // header blocks
	block       bytes.Buffer
	encoder     *hpack.Encoder // of calls with a timeout, which differs for each; or nil
	header      []hpack.HeaderField
	id          uint32 // of the last stream
	calls       []byte // frames
	open        atomic.Int64
	done        chan struct{}
	served      chan struct{}
}

func newFrameClient(t testing.TB, address, path string, message []byte) *frameClient {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	header := []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path},
		{Name: ":authority", Value: "etcd"}, {Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
	}
	first, then := blocks(header)
	c := &frameClient{
		framePeer: newFramePeer(conn), header: header, request: append(rpc.Header(len(message)), message...), first: first[0], then: then[0],
		done: make(chan struct{}, 1), served: make(chan struct{}),
	}
	c.handle = func(f frame) {
		if f.ends() {
			c.end()
		}
	}
	return c
}

// end notes the end of a call.
func (c *frameClient) end() {
	if c.open.Add(-1) == 0 {
		c.done <- struct{}{}
	}
}

// start begins the connection.
func (c *frameClient) start(t testing.TB) {
	t.Helper()
	if _, err := c.conn.Write(appendFrame([]byte(http2.ClientPreface), http2.FrameSettings, 0, 0)); err != nil {
		t.Fatal(err)
	}
	go func() {
		c.serve()
		close(c.served)
	}()
	t.Cleanup(func() {
		c.conn.Close()
		<-c.served
	})
}

// nextHeader returns the header block of the next call, and counts its stream.
func (c *frameClient) nextHeader() []byte {
	first := c.id == 0
	if c.id += 2; first {
		c.id = 1
	}
	switch {
	case c.encoder != nil:
		c.block.Reset()
		for _, f := range c.header {
			_ = c.encoder.WriteField(f)
		}
		_ = c.encoder.WriteField(hpack.HeaderField{Name: "grpc-timeout", Value: strconv.Itoa(29_000_000+int(c.id%1_000_000)) + "u"})
		return c.block.Bytes()
	case first:
		return c.first
	}
	return c.then
}

// setTimeouts has each call have another timeout.
func (c *frameClient) setTimeouts() { c.encoder = hpack.NewEncoder(&c.block) }

// batch makes n calls at the same time, and waits for their ends.
func (c *frameClient) batch(t testing.TB, n int) {
	c.open.Store(int64(n))
	c.calls = c.calls[:0]
	for range n {
		block := c.nextHeader()
		c.calls = appendFrame(c.calls, http2.FrameHeaders, http2.FlagHeadersEndHeaders, c.id, block)
		c.calls = appendFrame(c.calls, http2.FrameData, http2.FlagDataEndStream, c.id, c.request)
	}
	c.send(t)
}

// send sends the frames in calls, and waits until no call is open.
func (c *frameClient) send(t testing.TB) {
	t.Helper()
	if _, err := c.conn.Write(c.calls); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.done:
	case <-c.served:
		t.Fatal("the proxy has closed the connection")
	}
}

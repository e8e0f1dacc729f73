// Package http2conn is one connection of HTTP/2, from either side, as gRPC uses it: streams, header blocks, flow control, pings and the two ways to leave. It moves bytes
// and knows nothing of what they mean.
//
// golang.org/x/net/http2 reads the frames and golang.org/x/net/http2/hpack codes the headers. What is here is what lies between them and an engine
// that moves streams from one connection to another: frames are handled on the one goroutine that reads the connection, what is to be sent gathers
// in a buffer until somebody flushes it, and what the peer's windows do not take waits in the stream.
//
// The protocol is RFC 9113.
package http2conn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"
)

// Sizes, in bytes.
const (
	frameSize     = 16 << 10   // the largest frame that either side sends, unless the peer says otherwise
	initialWindow = 64<<10 - 1 // of every connection and stream, unless said otherwise
	streamWindow  = 512 << 10  // what a peer may send on a stream before it is given credit
	connWindow    = 4 << 20    // what it may send on all streams
	minOut        = 4 << 10    // the least buffer for it
	outLimit      = 256 << 10  // what gathers for one write; the rest waits in its streams
	heldLimit     = 1 << 20    // what may wait for a peer that sends: of data no more than was gathered twice, the rest is answers to what it sends
)

// lingering is how long a client may take to close a connection that the server has left: to close it while the client still sends something would have TCP drop what the client has not
// got yet. grpc-go waits as long.
const lingering = time.Second

// Handler receives the events of a connection. All methods but Writable and FlushNeeded are called on
// the goroutine of [Conn.Serve], one at a time. None may block for long. Arguments are valid until the
// method returns, except for header fields.
type Handler interface {
	// Headers is called on a server for the request header of a new stream, and on a client for the
	// response header or trailer. end is END_STREAM.
	Headers(s *Stream, fields []hpack.HeaderField, end bool)
	// Data is called for DATA. The handler returns its length to the flow-control window with
	// [Stream.Consumed].
	Data(s *Stream, data []byte, end bool)
	// Reset is called when the peer has reset or refused a stream.
	Reset(s *Stream, code http2.ErrCode)
	// Writable is called when all queued data of a stream was written. Any goroutine that flushes may
	// call it.
	Writable(s *Stream)
	// SettingsReceived is called after the first SETTINGS frame of the peer: it speaks HTTP/2.
	SettingsReceived()
	// GoAwayReceived is called on a client when the server accepts no new streams.
	GoAwayReceived()
	// FlushNeeded is called when frames should be flushed: before the connection waits for its peer,
	// when the peer reads again, and by timers. Any goroutine may call it.
	FlushNeeded()
}

// Config configures a connection.
type Config struct {
	Handler Handler
	Pool    mem.BufferPool // of all buffers; it clears what it is given back
	// WriteBuffer is what the connection writes to: itself, or what is below TLS. Nil: [NewServer] and
	// [NewClient] wrap the connection in one.
	WriteBuffer *WriteBuffer
	// Plaintext is set without TLS: long data is then written from where it is, without a copy.
	Plaintext bool
	// HandshakeTimeout bounds the time until the peer's first SETTINGS frame. 0: no limit.
	HandshakeTimeout time.Duration
	// MinPingInterval is the minimum ping interval of a client. A client that sends more pings is sent a
	// GOAWAY frame with ENHANCE_YOUR_CALM, as by grpc-go. 0: pings are not limited, as by net/http.
	MinPingInterval time.Duration
	// Strict has a server reset requests that are malformed by RFC 9113, section 8, though gRPC could
	// serve them: without a method, scheme or path, with header fields of a connection, or with
	// another length than stated. net/http is strict, and grpc-go is not.
	Strict bool
	// KeepaliveTime is the idle time after which a ping is sent. 0: no ping is sent.
	KeepaliveTime time.Duration
	// KeepaliveTimeout is how long to wait for any answer to a ping.
	KeepaliveTimeout time.Duration
	// PermitWithoutStream sends keepalive pings without open streams, too.
	PermitWithoutStream bool
	// IdleTimeout is how long a client keeps a connection without streams. 0: no limit.
	IdleTimeout time.Duration
}

// Conn is one connection. [Conn.Serve] reads it; everything else is safe for concurrent use.
type Conn struct {
	cfg    Config
	conn   net.Conn
	outlet *WriteBuffer
	server bool // the peer opens the streams

	// Of the goroutine that reads.
	in       input
	framer   *http2.Framer
	head     http2.FrameHeader // of the frame that was read last
	last     uint32            // the highest stream of the peer
	bytes    int64             // that the peer has sent
	moved    int64             // windows of streams that its settings have changed
	received int               // on all streams, that no credit was given for
	pings    pings

	ending  atomic.Bool  // it is to close with its last stream
	reading atomic.Bool  // it waits for the peer
	heard   atomic.Int64 // how often the peer was heard
	dirty   atomic.Bool  // there may be something to flush
	writing sync.Mutex   // held by who writes to conn; taken before mu

	mu       sync.Mutex
	out      *[]byte // what gathers; nil or of cfg.Pool
	apart    aparts  // what is to be written between the bytes of out
	busy     bool    // what has gathered is being written
	write    *http2.Framer
	enc      *hpack.Encoder
	block    bytes.Buffer // what enc writes to
	streams  map[uint32]*Stream
	gone     endedStreams // of a server
	next     uint32       // the stream that is opened next
	window   int64        // what the peer takes on all streams
	initial  int64        // what it takes on a new stream
	maxFrame int
	limit    uint32    // of streams, as the peer says
	ready    []*Stream // have something to send that their own windows take
	drained  []*Stream // that Writable is to be called for
	told     bool      // the client knows why the connection ends
	leaving  bool      // the server takes no new streams
	closed   bool
	why      error // that it was closed
	alive    *time.Timer
	hears    *time.Timer // until the client must have heard that the server leaves
	idle     *time.Timer
	goneAt   uint32 // streams above it are not served; set while the server leaves
}

// NewServer makes the side that clients connect to. Nothing is read before [Conn.Serve].
func NewServer(conn net.Conn, cfg Config) *Conn {
	c := newConn(conn, cfg)
	c.server, c.goneAt = true, math.MaxInt32
	_ = c.write.WriteSettings(
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: streamWindow},
	)
	_ = c.write.WriteWindowUpdate(0, connWindow-initialWindow)
	return c
}

// NewClient makes the side that opens streams. The peer hears of it with the first flush.
func NewClient(conn net.Conn, cfg Config) *Conn {
	c := newConn(conn, cfg)
	c.next = 1
	c.append([]byte(http2.ClientPreface))
	_ = c.write.WriteSettings(
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: streamWindow},
	)
	_ = c.write.WriteWindowUpdate(0, connWindow-initialWindow)
	return c
}

func newConn(conn net.Conn, cfg Config) *Conn {
	c := &Conn{
		cfg: cfg, conn: conn, streams: make(map[uint32]*Stream),
		window: initialWindow, initial: initialWindow, maxFrame: frameSize, limit: math.MaxUint32,
	}
	if c.outlet = cfg.WriteBuffer; c.outlet == nil {
		c.outlet = NewWriteBuffer(conn)
		c.conn = c.outlet
	}
	c.outlet.use(cfg.Pool, c.freed)
	c.in = input{read: c.read, pool: cfg.Pool}
	c.framer = http2.NewFramer(nil, &c.in)
	c.framer.SetReuseFrames()
	c.framer.SetMaxReadFrameSize(frameSize)
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.write = http2.NewFramer((*gatherer)(c), nil)
	c.enc = hpack.NewEncoder(&c.block)
	return c
}

// read reads from the connection, after what has gathered was flushed: whoever waits for the peer must not keep it waiting.
func (c *Conn) read(b []byte) (int, error) {
	c.cfg.Handler.FlushNeeded()
	c.reading.Store(true)
	c.hold()
	n, err := c.conn.Read(b)
	c.reading.Store(false)
	c.heard.Add(1)
	c.bytes += int64(n)
	return n, err
}

// hold waits for a peer that sends and does not read, or what is for it would gather without end. It is as silent as one that says nothing.
func (c *Conn) hold() {
	for c.outlet.full.Load() {
		c.mu.Lock()
		waits := c.gathered()
		c.mu.Unlock()
		if waits+c.outlet.holds() < heldLimit {
			return
		}
		c.outlet.wait()
	}
}

// freed goes on with what has gathered while the peer took nothing.
func (c *Conn) freed(err error) {
	if err != nil {
		c.fail(err)
		return
	}
	c.cfg.Handler.FlushNeeded()
	c.closeIfDone()
}

// errLeft ends a connection that was to end.
var errLeft = errors.New("the connection has come to its end")

// Serve reads the connection until it ends, says why, and leaves it closed. [Conn.Streams] then are those that were not at their end.
func (c *Conn) Serve() error {
	err := c.serve()
	if v := c.violated(err); v != nil && c.server { // a client closes at once
		c.opened()
		c.bye(v.code, v.text)
	}
	c.fail(err)
	c.in.free()
	_, _ = io.Copy(io.Discard, c.conn) // which ends at once, unless fail lets the connection linger
	_ = c.conn.Close()
	c.outlet.writer.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.why
}

func (c *Conn) serve() error {
	if c.cfg.HandshakeTimeout > 0 {
		if err := c.conn.SetReadDeadline(time.Now().Add(c.cfg.HandshakeTimeout)); err != nil {
			return err
		}
	}
	if c.server {
		if err := c.preface(); err != nil {
			return err
		}
	}
	c.keepAlive()
	c.mu.Lock()
	c.rest()
	c.mu.Unlock()
	for first := true; ; first = false {
		f, err := c.frame()
		if first && err == nil {
			err = c.conn.SetReadDeadline(time.Time{})
		}
		var bad http2.StreamError
		if _, ok := f.(*http2.SettingsFrame); first && !ok && (err == nil || errors.As(err, &bad)) {
			err = &violation{http2.ErrCodeProtocol, textFirst}
		}
		switch {
		case c.over():
			err = errLeft
		case err == nil && f != nil:
			err = c.handle(f)
		case !first && errors.As(err, &bad): // the frame was read whole, and is not as it should be
			err = c.refuseFrame(bad)
		}
		if err != nil {
			return err
		}
		if first {
			c.cfg.Handler.SettingsReceived()
		}
	}
}

// over reports whether the connection lingers.
func (c *Conn) over() bool {
	if !c.ending.Load() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *Conn) preface() error {
	var got [len(http2.ClientPreface)]byte
	c.cfg.Handler.FlushNeeded()
	if _, err := io.ReadFull(c.conn, got[:]); err != nil {
		return fmt.Errorf("read the preface: %w", err)
	}
	if string(got[:]) != http2.ClientPreface {
		return &violation{http2.ErrCodeProtocol, textPreface}
	}
	return nil
}

// bye tells the peer why the connection ends, as far as it listens.
func (c *Conn) bye(code http2.ErrCode, text string) {
	c.mu.Lock()
	if !c.closed {
		_ = c.write.WriteGoAway(c.last, code, []byte(text))
		c.told = true
	}
	c.mu.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(time.Second))
	c.Flush()
}

// Close ends the connection at once. It may be called more than once.
func (c *Conn) Close() {
	c.fail(net.ErrClosed)
	_ = c.conn.Close() // it may linger
}

func (c *Conn) fail(why error) {
	c.mu.Lock()
	first := !c.closed
	lingers := first && c.server && (c.told || errors.Is(why, errLeft))
	if first {
		c.closed, c.why = true, why
		for _, t := range []*time.Timer{c.alive, c.idle, c.hears} {
			if t != nil {
				t.Stop()
			}
		}
		c.drop()
		for _, s := range c.streams {
			s.free()
		}
		c.ready, c.drained = nil, nil
	}
	c.mu.Unlock()
	switch {
	case lingers:
		_ = c.conn.SetReadDeadline(time.Now().Add(lingering))
	case first:
		_ = c.conn.Close() // over TLS it says goodbye, and may wait for that
	}
}

// Streams returns those that are not at their end; and of a client those whose end has not come.
func (c *Conn) Streams() []*Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]*Stream, 0, len(c.streams))
	for _, s := range c.streams {
		if c.server || !s.remoteEnd {
			all = append(all, s)
		}
	}
	return all
}

// CanOpen reports whether the peer takes one more stream.
func (c *Conn) CanOpen() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.takes()
}

func (c *Conn) takes() bool {
	return !c.closed && !c.leaving && uint32(len(c.streams)) < c.limit && c.next <= math.MaxInt32 //nolint:gosec // a map of four thousand millions does not fit
}

// Draining reports whether no new stream can ever be opened.
func (c *Conn) Draining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed || c.leaving || c.next > math.MaxInt32
}

// closeIfDone closes a connection that has served its last stream.
func (c *Conn) closeIfDone() {
	if !c.ending.Load() {
		return
	}
	c.mu.Lock()
	done := len(c.streams) == 0 && c.out == nil && !c.busy && !c.outlet.full.Load() && (!c.server || c.goneAt != math.MaxInt32)
	c.mu.Unlock()
	if done {
		c.fail(errLeft)
	}
}

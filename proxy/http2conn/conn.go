// Package http2conn implements one HTTP/2 connection (RFC 9113), as client or server, for a proxy
// that moves gRPC streams between connections: streams, header blocks, flow control, keepalive,
// GOAWAY and the limits on what a peer can make the process hold. It does not read gRPC messages.
//
// golang.org/x/net/http2 parses and writes frames, and golang.org/x/net/http2/hpack codes header
// fields. This package adds what a proxy needs and net/http and grpc-go do not offer: frames are
// handled on the goroutine that reads the connection, frames to be sent collect in a buffer until
// [Conn.Flush], and data that the peer's flow-control windows do not take waits in its stream.
package http2conn

import (
	"errors"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// Sizes in bytes.
const (
	maxFrameSize  = 16 << 10   // of frames that either side sends, unless the peer allows more
	defaultWindow = 64<<10 - 1 // flow-control window of connections and streams by the RFC
	clientWindow  = 512 << 10  // of each stream of a client; that of a server's is defaultWindow
	connWindow    = 4 << 20    // of all streams of a connection
	minWriteSize  = 4 << 10    // of the buffer for frames to be written
	flushLimit    = 256 << 10  // data frames in that buffer; more data waits in its streams
	// maxResponseHeader limits the header list of a response, with which etcd is trusted.
	maxResponseHeader = 16 << 20
	// readPauseLimit: bytes that wait for a peer which does not read: then it is not read either
	readPauseLimit = 512 << 10
)

// lingerTimeout is how long a server waits for the client to close the connection. If the server
// closed first while the client still sends, TCP would discard what the client has not read yet.
// grpc-go waits as long.
const lingerTimeout = time.Second

// Handler receives the events of a connection. All methods but Writable and FlushNeeded are called
// on the goroutine of [Conn.Serve], one at a time. None may block for long. Arguments are valid
// until the method returns, except for header fields.
type Handler interface {
	// Headers is called on a server for the request header of a new stream, and on a client for the
	// response header or trailer. end is END_STREAM.
	Headers(s *Stream, fields []hpack.HeaderField, end bool)
	// Data is called for DATA. The handler returns its length to the flow-control window with
	// [Stream.Consumed].
	Data(s *Stream, data []byte, end bool)
	// Reset is called when the peer has reset or refused a stream, and when the stream was reset
	// for an error of the peer.
	Reset(s *Stream, code http2.ErrCode)
	// Writable is called when all queued data of a stream was written. Any goroutine that flushes
	// may call it.
	Writable(s *Stream)
	// SettingsReceived is called after the first SETTINGS frame of the peer: it speaks HTTP/2.
	SettingsReceived()
	// GoAwayReceived is called on a client when the server accepts no new streams.
	GoAwayReceived()
	// FlushNeeded is called when frames should be flushed: before the connection waits for its
	// peer, when the peer reads again, and by timers. Any goroutine may call it.
	FlushNeeded()
}

// Config configures a connection.
type Config struct {
	Handler Handler
	Pool    mem.BufferPool // of all buffers; it clears what it is given back
	// WriteBuffer is what the connection writes to: itself, or what is below TLS, after the
	// handshake. Nil: [NewServer] and [NewClient] wrap the connection in one.
	WriteBuffer *writebuffer.Buffer
	// Plaintext is set without TLS: long data is then written from where it is, without a copy.
	Plaintext bool
	// NewStream, if not nil, returns the memory for the next stream of a client, with its value.
	NewStream func() *Stream
	// Budget limits what all servers of the process hold. Nil: only the limits of one connection
	// apply.
	Budget *Budget
	// BeforeRead, if not nil, is called before each read. While it blocks, TCP has the peer wait.
	BeforeRead func()
	// HandshakeTimeout bounds the time until the peer's first SETTINGS frame. 0: no limit.
	HandshakeTimeout time.Duration
	// MinPingInterval is the minimum ping interval of a client. A client that sends more pings is
	// sent a GOAWAY frame with ENHANCE_YOUR_CALM, as by grpc-go. 0: pings are not limited, as by
	// net/http.
	MinPingInterval time.Duration
	// Strict has a server reset requests that are malformed by RFC 9113, section 8, though gRPC
	// could serve them: without a method, scheme or path, with header fields of a connection, or
	// with another length than stated. net/http is strict, and grpc-go is not.
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

// Conn is one connection. [Conn.Serve] reads it; all other methods are safe for concurrent use. Its
// parts are what the reading goroutine knows, what is to be written, the flow control of what is
// sent, the limits of what a client makes the process hold, and keepalive.
type Conn struct {
	cfg         Config
	conn        net.Conn
	writeBuffer *writebuffer.Buffer
	server      bool // the peer opens the streams
	recvWindow  int  // initial flow-control window of the streams that the peer sends on
	recv        receiver
	keepalive   keepalive

	closeWhenIdle atomic.Bool  // closes after the last stream
	detaching     atomic.Bool  // Detach was called
	reading       atomic.Bool  // waits for the peer
	reads         atomic.Int64 // completed
	flushing      atomic.Bool  // former pending bytes are being written
	flushMu       sync.Mutex   // held while writing to conn; locked before mu

	// mu guards everything below, and the streams.
	mu             sync.Mutex
	out            output
	send           sender
	limits         limits
	streams        map[uint32]*Stream
	recentlyEnded  endedStreams // of a server
	lastStreamID   uint32       // the highest that the peer has opened
	nextStreamID   uint32       // of a client
	peerMaxStreams uint32
	goAwaySent     bool   // the client knows why the connection ends
	draining       bool   // there will be no new streams
	lastServedID   uint32 // streams above it are not served; set during a graceful shutdown
	closed         bool
	err            error       // why it was closed
	shutdownTimer  *time.Timer // until the client must have seen the first GOAWAY frame
}

// NewServer returns the server side of a connection. It reads nothing before [Conn.Serve].
func NewServer(conn net.Conn, cfg Config) *Conn {
	c := newConn(conn, cfg, MaxHeaderListSize)
	c.server, c.lastServedID, c.recvWindow = true, math.MaxInt32, defaultWindow
	c.recv.decoder.strict = cfg.Strict
	_ = c.out.framer.WriteSettings(
		http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: MaxConcurrentStreams},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: MaxHeaderListSize},
	)
	_ = c.out.framer.WriteWindowUpdate(0, connWindow-defaultWindow)
	return c
}

// NewClient returns the client side of a connection. The first flush sends the preface.
func NewClient(conn net.Conn, cfg Config) *Conn {
	c := newConn(conn, cfg, maxResponseHeader)
	c.nextStreamID = 1
	c.out.append([]byte(http2.ClientPreface))
	_ = c.out.framer.WriteSettings(
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: clientWindow},
	)
	_ = c.out.framer.WriteWindowUpdate(0, connWindow-defaultWindow)
	return c
}

func newConn(conn net.Conn, cfg Config, maxHeaderList uint32) *Conn {
	c := &Conn{cfg: cfg, conn: conn, streams: make(map[uint32]*Stream), peerMaxStreams: math.MaxUint32, recvWindow: clientWindow}
	c.recv.Conn, c.keepalive.conn = c, c
	c.send = sender{conn: c, out: &c.out, window: defaultWindow, initialWindow: defaultWindow, maxFrame: maxFrameSize}
	c.limits = limits{out: &c.out, budget: cfg.Budget}
	c.out = output{pool: cfg.Pool, plaintext: cfg.Plaintext}
	if c.writeBuffer = cfg.WriteBuffer; c.writeBuffer == nil {
		c.writeBuffer = writebuffer.New(conn)
		c.conn = c.writeBuffer
	}
	if c.cfg.NewStream == nil {
		c.cfg.NewStream = func() *Stream { return new(Stream) }
	}
	c.writeBuffer.Use(cfg.Pool, c.writeBufferEmpty)
	c.recv.in = input{read: c.recv.read, pool: cfg.Pool}
	c.recv.framer = http2.NewFramer(nil, &c.recv.in)
	c.recv.framer.SetReuseFrames()
	c.recv.framer.SetMaxReadFrameSize(maxFrameSize)
	c.recv.framer.MaxHeaderListSize = maxHeaderList
	c.recv.decoder, c.recv.useFramer = newHeaderDecoder(maxHeaderList), true
	c.recv.framer.ReadMetaHeaders = c.recv.decoder.hpack
	c.out.framer = http2.NewFramer(&c.out, nil)
	c.out.encoder.hpack = hpack.NewEncoder(&c.out.encoder.block)
	return c
}

// Close closes the connection at once. It may be called more than once.
func (c *Conn) Close() {
	c.fail(net.ErrClosed)
	_ = c.conn.Close() // it may linger
}

// fail closes the connection for the reason given, or begins to linger.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	first := !c.closed
	lingers := first && c.server && (c.goAwaySent || errors.Is(err, errDrained))
	if first {
		c.closed, c.err = true, err
		for _, t := range []*time.Timer{c.keepalive.timer, c.keepalive.idleTimer, c.shutdownTimer, c.send.stallTimer, c.keepalive.ackTimer} {
			if t != nil {
				t.Stop()
			}
		}
		c.out.close()
		for _, s := range c.streams {
			s.free()
		}
		c.limits.releaseAll()
		c.send.ready, c.send.writable = nil, nil
	}
	c.mu.Unlock()
	switch {
	case lingers:
		_ = c.conn.SetReadDeadline(time.Now().Add(lingerTimeout))
	case first:
		_ = c.conn.Close() // TLS sends an alert, and may wait for that
	}
}

// Streams returns the open streams; of a client only those that the server has not ended.
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

// CanOpen reports whether the peer accepts one more stream now.
func (c *Conn) CanOpen() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.canOpen()
}

func (c *Conn) canOpen() bool {
	return !c.closed && !c.draining && len(c.streams) < int(c.peerMaxStreams) && c.nextStreamID <= math.MaxInt32
}

// Draining reports whether the connection will never accept a new stream.
func (c *Conn) Draining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed || c.draining || c.nextStreamID > math.MaxInt32
}

// closeIfDone closes a draining connection whose last stream has ended.
func (c *Conn) closeIfDone() {
	if !c.closeWhenIdle.Load() {
		return
	}
	c.mu.Lock()
	done := len(c.streams) == 0 && c.out.pending == nil && !c.flushing.Load() && !c.writeBuffer.Full() &&
		(!c.server || c.lastServedID != math.MaxInt32)
	c.mu.Unlock()
	if done {
		c.fail(errDrained)
	}
}

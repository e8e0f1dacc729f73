package http2conn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"golang.org/x/net/http2"
)

// receiver is what the goroutine of [Conn.Serve] alone uses: it reads and handles the frames of the
// peer.
type receiver struct {
	*Conn
	in                 input
	framer             *http2.Framer
	decoder            *headerDecoder
	useFramer          bool              // framer must read the next frame
	frameHeader        http2.FrameHeader // of the last frame
	bytesRead          int64
	windowChanges      int64 // of streams, by SETTINGS frames
	unannounced        int   // bytes received since the last WINDOW_UPDATE frame of the connection
	requestsSinceYield int   // requests since other connections had their turn
	pings              pings
}

// errDrained closes a connection after its last stream.
var errDrained = errors.New("the connection was drained")

// Serve reads the connection until it ends, closes it and returns the reason. Afterwards
// [Conn.Streams] returns the streams that had not ended.
func (c *Conn) Serve() error {
	err := c.recv.serve()
	detaching := c.detaching.Load() && errors.Is(err, os.ErrDeadlineExceeded)
	detached := detaching && c.detach()
	if detaching && !detached {
		c.sendGoAway(http2.ErrCodeNo, textShutdown)
	} else if v := c.recv.connectionError(err); v != nil && c.server { // a client just closes
		c.recv.noteOpened()
		c.sendGoAway(v.code, v.text)
	}
	c.fail(err)
	c.writeBuffer.BeforeRead(nil)
	c.recv.in.free()
	if !detached {
		_, _ = io.Copy(io.Discard, c.conn) // it ends at once, unless the connection lingers
	}
	_ = c.conn.Close()
	c.writeBuffer.WaitWriter()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (r *receiver) serve() error {
	r.writeBuffer.BeforeRead(r.beforeRead)
	if r.cfg.HandshakeTimeout > 0 {
		if err := r.setReadDeadline(time.Now().Add(r.cfg.HandshakeTimeout)); err != nil {
			return err
		}
	}
	if r.server {
		if err := r.readPreface(); err != nil {
			return err
		}
	}
	r.keepalive.start()
	r.mu.Lock()
	r.keepalive.startIdleTimer()
	r.mu.Unlock()
	if err := r.firstFrame(); err != nil {
		return err
	}
	r.cfg.Handler.SettingsReceived()
	for {
		if err := r.nextFrame(); err != nil {
			// the whole frame was read, and only its stream is wrong
			if bad, ok := errors.AsType[http2.StreamError](err); ok {
				err = r.resetMalformed(bad)
			}
			if err != nil {
				return err
			}
		}
	}
}

// firstFrame reads the frame with which each peer begins.
func (r *receiver) firstFrame() error {
	f, err := r.readFrame()
	if err == nil {
		err = r.setReadDeadline(time.Time{})
	}
	_, bad := errors.AsType[http2.StreamError](err)
	if _, ok := f.(*http2.SettingsFrame); !ok && (err == nil || bad) {
		return &violation{http2.ErrCodeProtocol, textFirst}
	}
	switch {
	case r.lingers():
		return errDrained
	case err != nil:
		return err
	}
	return r.handle(f)
}

// lingers reports whether the connection only waits for the client to close it.
func (r *receiver) lingers() bool {
	if !r.closeWhenIdle.Load() {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}

func (r *receiver) readPreface() error {
	var preface [len(http2.ClientPreface)]byte
	if _, err := io.ReadFull(r.conn, preface[:]); err != nil {
		return fmt.Errorf("read the preface: %w", err)
	}
	if string(preface[:]) != http2.ClientPreface {
		return &violation{http2.ErrCodeProtocol, textPreface}
	}
	return nil
}

// sendGoAway tells the client why the connection ends, if it reads that within a second.
func (c *Conn) sendGoAway(code http2.ErrCode, text string) {
	c.mu.Lock()
	if !c.closed {
		_ = c.out.framer.WriteGoAway(c.lastStreamID, code, []byte(text))
		c.goAwaySent = true
	}
	c.mu.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(time.Second))
	c.Flush()
}

// beforeRead flushes before the network is read: the peer may wait for what is pending. Over TLS
// the records that were read ahead are handled before, and what they cause leaves in one write.
//
// It pauses reading from a peer that sends but does not read, or responses to it would collect
// without limit. For the keepalive timer such a peer is idle.
func (r *receiver) beforeRead() {
	r.cfg.Handler.FlushNeeded()
	if r.cfg.BeforeRead != nil {
		r.cfg.BeforeRead()
	}
	r.reading.Store(true)
	for r.writeBuffer.Full() {
		r.mu.Lock()
		waiting := r.out.size()
		if r.server {
			waiting += r.send.queued.bytes
		}
		r.mu.Unlock()
		if waiting+r.writeBuffer.Size() < readPauseLimit {
			return
		}
		r.writeBuffer.Wait()
	}
}

// read reads from the connection.
func (r *receiver) read(b []byte) (int, error) {
	n, err := r.conn.Read(b)
	r.reading.Store(false)
	r.reads.Add(1)
	r.bytesRead += int64(n)
	return n, err
}

// writeBufferEmpty continues with pending frames when the peer reads again.
func (c *Conn) writeBufferEmpty(err error) {
	if err != nil {
		c.fail(err)
		return
	}
	c.cfg.Handler.FlushNeeded()
	c.closeIfDone()
}

// nextFrame reads and handles a frame.
func (r *receiver) nextFrame() error {
	if !r.useFramer {
		if handled, err := r.frequentFrame(); handled || err != nil {
			return err
		}
	}
	f, err := r.readFrame()
	switch {
	case r.lingers():
		return errDrained
	case err != nil || f == nil:
		return err
	}
	return r.handle(f)
}

// frameHeaderSize is the length of a frame's header in bytes.
const frameHeaderSize = 9

// frequentFrame reads and handles a frame of the kinds that calls consist of, from the read buffer
// and without an allocation. It reports false if it has left the frame for http2.Framer: frames of
// other kinds, frames that are longer than the read buffer, and frames that are malformed.
func (r *receiver) frequentFrame() (handled bool, err error) {
	in := &r.in
	b, err := in.collect(frameHeaderSize)
	if err != nil {
		return false, err
	}
	head := http2.FrameHeader{
		Length:   uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]),
		Type:     http2.FrameType(b[3]),
		Flags:    http2.Flags(b[4]),
		StreamID: binary.BigEndian.Uint32(b[5:]) & math.MaxInt32,
	}
	n := frameHeaderSize + int(head.Length)
	if head.Length > maxFrameSize {
		return false, nil
	}
	if head.Type != http2.FrameData {
		if b, err = in.collect(n); err != nil || len(b) < n {
			return false, err
		}
	}
	const otherHeaders = http2.FlagHeadersPadded | http2.FlagHeadersPriority
	switch head.Type {
	case http2.FrameData:
		if head.StreamID == 0 || head.Flags.Has(http2.FlagDataPadded) {
			return false, nil
		}
		in.r += frameHeaderSize
		r.frameHeader = head
		return true, r.data(head, nil, int(head.Length))
	case http2.FrameHeaders:
		if head.StreamID == 0 || head.Flags&otherHeaders != 0 || !head.Flags.Has(http2.FlagHeadersEndHeaders) || r.lingers() {
			return false, nil
		}
		in.r += n
		r.frameHeader = head
		list, err := r.decoder.decode(head.StreamID, b[frameHeaderSize:n])
		if err != nil {
			return true, err
		}
		return true, r.headers(&headerFrame{FrameHeader: head, headerList: list})
	case http2.FrameWindowUpdate:
		const size = 4
		increment := uint32(0)
		if head.Length == size {
			increment = binary.BigEndian.Uint32(b[frameHeaderSize:]) & math.MaxInt32
		}
		if increment == 0 || r.lingers() {
			return false, nil
		}
		in.r += n
		r.frameHeader = head
		return true, r.windowUpdate(head.StreamID, increment)
	case http2.FramePing:
		var data [8]byte
		if head.Length != uint32(len(data)) || head.StreamID != 0 || r.lingers() {
			return false, nil
		}
		in.r += n
		r.frameHeader = head
		copy(data[:], b[frameHeaderSize:])
		return true, r.ping(head.Flags.Has(http2.FlagPingAck), data)
	}
	return false, nil
}

// readFrame reads a frame by http2.Framer. It returns nil for DATA frames without padding: those
// are handled from the read buffer, where http2.Framer would copy them.
func (r *receiver) readFrame() (http2.Frame, error) {
	head, err := r.framer.ReadFrameHeader()
	if err != nil {
		return nil, err
	}
	r.frameHeader = head
	r.useFramer = false
	switch head.Type {
	case http2.FrameData:
		if head.StreamID != 0 && !head.Flags.Has(http2.FlagDataPadded) {
			return nil, r.data(head, nil, int(head.Length))
		}
	case http2.FrameHeaders, http2.FrameContinuation:
		r.decoder.memo.clear()
		// If it is malformed, http2.Framer expects the rest of the block next.
		r.useFramer = !head.Flags.Has(http2.FlagHeadersEndHeaders)
	}
	return r.framer.ReadFrameForHeader(head)
}

// handle handles a frame. An error ends the connection. Where etcd's server just closes the
// connection, the client is told why; otherwise clients see the behavior of etcd.
func (r *receiver) handle(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.DataFrame:
		return r.data(f.FrameHeader, f.Data(), 0)
	case *http2.MetaHeadersFrame:
		list := headerList{fields: f.Fields, truncated: f.Truncated}
		list.inspect(r.decoder.strict)
		selfDependent := f.HasPriority() && f.Priority.StreamDep == f.StreamID
		return r.headers(&headerFrame{f.FrameHeader, list, selfDependent})
	case *http2.WindowUpdateFrame:
		return r.windowUpdate(f.StreamID, f.Increment)
	case *http2.PingFrame:
		return r.ping(f.IsAck(), f.Data)
	case *http2.SettingsFrame:
		return r.settings(f)
	case *http2.RSTStreamFrame:
		return r.reset(f)
	case *http2.PriorityFrame:
		return r.priority(f.StreamID, f.PriorityParam)
	case *http2.PushPromiseFrame:
		if r.server {
			return &violation{http2.ErrCodeProtocol, textPush}
		}
	case *http2.GoAwayFrame:
		r.goAway(f)
	}
	return nil // frames of unknown types are ignored
}

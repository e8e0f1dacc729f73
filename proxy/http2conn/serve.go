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

// errDrained closes a connection after its last stream.
var errDrained = errors.New("the connection was drained")

// Serve reads the connection until it ends, closes it and returns the reason. Afterwards
// [Conn.Streams] returns the streams that had not ended.
func (c *Conn) Serve() error {
	err := c.serve()
	detaching := c.detaching.Load() && errors.Is(err, os.ErrDeadlineExceeded)
	detached := detaching && c.detach()
	if detaching && !detached {
		c.sendGoAway(http2.ErrCodeNo, textShutdown)
	} else if v := c.connectionError(err); v != nil && c.server { // a client just closes
		c.noteOpened()
		c.sendGoAway(v.code, v.text)
	}
	c.fail(err)
	c.in.free()
	if !detached {
		_, _ = io.Copy(io.Discard, c.conn) // it ends at once, unless the connection lingers
	}
	_ = c.conn.Close()
	c.writeBuffer.writer.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Conn) serve() error {
	if c.cfg.HandshakeTimeout > 0 {
		if err := c.setReadDeadline(time.Now().Add(c.cfg.HandshakeTimeout)); err != nil {
			return err
		}
	}
	if c.server {
		if err := c.readPreface(); err != nil {
			return err
		}
	}
	c.keepAlive()
	c.mu.Lock()
	c.startIdleTimer()
	c.mu.Unlock()
	if err := c.firstFrame(); err != nil {
		return err
	}
	c.cfg.Handler.SettingsReceived()
	for {
		if err := c.nextFrame(); err != nil {
			// the whole frame was read, and only its stream is wrong
			if bad, ok := errors.AsType[http2.StreamError](err); ok {
				err = c.resetMalformed(bad)
			}
			if err != nil {
				return err
			}
		}
	}
}

// firstFrame reads the frame with which each peer begins.
func (c *Conn) firstFrame() error {
	f, err := c.readFrame()
	if err == nil {
		err = c.setReadDeadline(time.Time{})
	}
	_, bad := errors.AsType[http2.StreamError](err)
	if _, ok := f.(*http2.SettingsFrame); !ok && (err == nil || bad) {
		return &violation{http2.ErrCodeProtocol, textFirst}
	}
	switch {
	case c.lingers():
		return errDrained
	case err != nil:
		return err
	}
	return c.handle(f)
}

// lingers reports whether the connection only waits for the client to close it.
func (c *Conn) lingers() bool {
	if !c.closeWhenIdle.Load() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *Conn) readPreface() error {
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

// sendGoAway tells the client why the connection ends, if it reads that within a second.
func (c *Conn) sendGoAway(code http2.ErrCode, text string) {
	c.mu.Lock()
	if !c.closed {
		_ = c.write.WriteGoAway(c.lastStreamID, code, []byte(text))
		c.goAwaySent = true
	}
	c.mu.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(time.Second))
	c.Flush()
}

// read reads from the connection after a flush: the peer may wait for what is pending.
func (c *Conn) read(b []byte) (int, error) {
	c.cfg.Handler.FlushNeeded()
	if c.cfg.BeforeRead != nil {
		c.cfg.BeforeRead()
	}
	c.reading.Store(true)
	c.waitForWriter()
	n, err := c.conn.Read(b)
	c.reading.Store(false)
	c.reads.Add(1)
	c.bytesRead += int64(n)
	return n, err
}

// waitForWriter pauses reading from a peer that sends but does not read, or responses to it would
// collect without limit. For the keepalive timer such a peer is idle.
func (c *Conn) waitForWriter() {
	for c.writeBuffer.full.Load() {
		c.mu.Lock()
		waiting := c.pendingBytes()
		if c.server {
			waiting += c.queued.bytes
		}
		c.mu.Unlock()
		if waiting+c.writeBuffer.size() < readPauseLimit {
			return
		}
		c.writeBuffer.wait()
	}
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
func (c *Conn) nextFrame() error {
	if !c.useFramer {
		if handled, err := c.frequentFrame(); handled || err != nil {
			return err
		}
	}
	f, err := c.readFrame()
	switch {
	case c.lingers():
		return errDrained
	case err != nil || f == nil:
		return err
	}
	return c.handle(f)
}

// frameHeaderSize is the length of a frame's header in bytes.
const frameHeaderSize = 9

// frequentFrame reads and handles a frame of the kinds that calls consist of, from the read buffer
// and without an allocation. It reports false if it has left the frame for http2.Framer: frames of
// other kinds, frames that are longer than the read buffer, and frames that are malformed.
func (c *Conn) frequentFrame() (handled bool, err error) {
	in := &c.in
	b, err := in.gather(frameHeaderSize)
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
		if b, err = in.gather(n); err != nil || len(b) < n {
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
		c.frameHeader = head
		return true, c.data(head, nil, int(head.Length))
	case http2.FrameHeaders:
		if head.StreamID == 0 || head.Flags&otherHeaders != 0 || !head.Flags.Has(http2.FlagHeadersEndHeaders) || c.lingers() {
			return false, nil
		}
		in.r += n
		c.frameHeader = head
		list, err := c.decoder.decode(head.StreamID, b[frameHeaderSize:n])
		if err != nil {
			return true, err
		}
		return true, c.headers(&headerFrame{FrameHeader: head, headerList: list})
	case http2.FrameWindowUpdate:
		const size = 4
		increment := uint32(0)
		if head.Length == size {
			increment = binary.BigEndian.Uint32(b[frameHeaderSize:]) & math.MaxInt32
		}
		if increment == 0 || c.lingers() {
			return false, nil
		}
		in.r += n
		c.frameHeader = head
		return true, c.windowUpdate(head.StreamID, increment)
	case http2.FramePing:
		var data [8]byte
		if head.Length != uint32(len(data)) || head.StreamID != 0 || c.lingers() {
			return false, nil
		}
		in.r += n
		c.frameHeader = head
		copy(data[:], b[frameHeaderSize:])
		return true, c.ping(head.Flags.Has(http2.FlagPingAck), data)
	}
	return false, nil
}

// readFrame reads a frame by http2.Framer. It returns nil for DATA frames without padding: those
// are handled from the read buffer, where http2.Framer would copy them.
func (c *Conn) readFrame() (http2.Frame, error) {
	head, err := c.framer.ReadFrameHeader()
	if err != nil {
		return nil, err
	}
	c.frameHeader = head
	c.useFramer = false
	switch head.Type {
	case http2.FrameData:
		if head.StreamID != 0 && !head.Flags.Has(http2.FlagDataPadded) {
			return nil, c.data(head, nil, int(head.Length))
		}
	case http2.FrameHeaders, http2.FrameContinuation:
		c.decoder.memo.clear()
		// If it is malformed, http2.Framer expects the rest of the block next.
		c.useFramer = !head.Flags.Has(http2.FlagHeadersEndHeaders)
	}
	return c.framer.ReadFrameForHeader(head)
}

// handle handles a frame. An error ends the connection. Where etcd's server just closes the
// connection, the client is told why; otherwise clients see the behavior of etcd.
func (c *Conn) handle(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.DataFrame:
		return c.data(f.FrameHeader, f.Data(), 0)
	case *http2.MetaHeadersFrame:
		list := headerList{fields: f.Fields, truncated: f.Truncated}
		list.inspect(c.decoder.strict)
		onItself := f.HasPriority() && f.Priority.StreamDep == f.StreamID
		return c.headers(&headerFrame{f.FrameHeader, list, onItself})
	case *http2.WindowUpdateFrame:
		return c.windowUpdate(f.StreamID, f.Increment)
	case *http2.PingFrame:
		return c.ping(f.IsAck(), f.Data)
	case *http2.SettingsFrame:
		return c.settings(f)
	case *http2.RSTStreamFrame:
		return c.reset(f)
	case *http2.PriorityFrame:
		return c.priority(f.StreamID, f.PriorityParam)
	case *http2.PushPromiseFrame:
		if c.server {
			return &violation{http2.ErrCodeProtocol, textPush}
		}
	case *http2.GoAwayFrame:
		c.goAway(f)
	}
	return nil // frames of unknown types are ignored
}

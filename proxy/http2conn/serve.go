package http2conn

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/net/http2"
)

// errDrained closes a connection after its last stream.
var errDrained = errors.New("the connection was drained")

// Serve reads the connection until it ends, closes it and returns the reason. Afterwards
// [Conn.Streams] returns the streams that had not ended.
func (c *Conn) Serve() error {
	err := c.serve()
	if v := c.connectionError(err); v != nil && c.server { // a client just closes
		c.noteOpened()
		c.sendGoAway(v.code, v.text)
	}
	c.fail(err)
	c.in.free()
	_, _ = io.Copy(io.Discard, c.conn) // it ends at once, unless the connection lingers
	_ = c.conn.Close()
	c.writeBuffer.writer.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Conn) serve() error {
	if c.cfg.HandshakeTimeout > 0 {
		if err := c.conn.SetReadDeadline(time.Now().Add(c.cfg.HandshakeTimeout)); err != nil {
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
		case c.lingers():
			err = errDrained
		case err == nil && f != nil:
			err = c.handle(f)
		case !first && errors.As(err, &bad): // the whole frame was read, and only its stream is wrong
			err = c.resetMalformed(bad)
		}
		if err != nil {
			return err
		}
		if first {
			c.cfg.Handler.SettingsReceived()
		}
	}
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

// frame reads the next frame. It returns nil for most DATA frames: those are handled from the read
// buffer, where http2.Framer would copy them.
func (c *Conn) frame() (http2.Frame, error) {
	head, err := c.framer.ReadFrameHeader()
	if err != nil {
		return nil, err
	}
	c.frameHeader = head
	if head.Type == http2.FrameData && head.StreamID != 0 && !head.Flags.Has(http2.FlagDataPadded) {
		return nil, c.data(head, nil, int(head.Length))
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
		return c.headers(f)
	case *http2.WindowUpdateFrame:
		return c.windowUpdate(f)
	case *http2.PingFrame:
		return c.ping(f)
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

package http2conn

import (
	"errors"
	"io"
	"net"
	"time"

	"golang.org/x/net/http2"
)

// Detached is the socket of a connection that was detached, and the bytes that are written to it
// before it closes: a GOAWAY frame and the end of TLS.
type Detached struct {
	conn net.Conn
	last []byte
}

// expired is a deadline that has a read return at once.
var expired = time.Unix(1, 0)

// Detach has [Conn.Serve] of a server return as soon as the connection waits for the client, and
// frees what the connection holds, except for its socket: see [Conn.Detached]. It is for clients
// that are worth no memory. If such a connection were closed, many clients would connect again at
// once, even if they send nothing, and a TLS handshake costs more than the connection. A client
// with a detached connection notices nothing until it sends something.
func (c *Conn) Detach() {
	c.detaching.Store(true)
	_ = c.conn.SetReadDeadline(expired)
}

// setReadDeadline sets the deadline for reads, unless Detach was called.
func (c *Conn) setReadDeadline(t time.Time) error {
	err := c.conn.SetReadDeadline(t)
	if c.detaching.Load() {
		err = c.conn.SetReadDeadline(expired)
	}
	return err
}

// detach detaches the socket, and reports whether it could: not while streams are open or frames
// wait to be written.
func (c *Conn) detach() bool {
	c.keepalive.flushAcks()
	c.mu.Lock()
	idle := !c.closed && len(c.streams) == 0 && c.out.pending == nil && !c.flushing.Load()
	detached := idle && c.writeBuffer.Detach()
	if detached {
		_ = c.out.framer.WriteGoAway(c.lastStreamID, http2.ErrCodeNo, []byte(textShutdown))
	}
	c.mu.Unlock()
	c.Flush()
	return detached
}

// Detached returns the socket if the connection was detached, and else nil. It is called after
// [Conn.Serve] has returned.
func (c *Conn) Detached() *Detached {
	conn, last := c.writeBuffer.Detached()
	if conn == nil {
		return nil
	}
	_ = conn.SetReadDeadline(time.Time{})
	return &Detached{conn: conn, last: last}
}

// Wait waits until the client sends something or closes the connection, or until [Detached.End].
// Then it tells the client that no stream was served since the connection was detached, so that the
// client can send its calls again on a new connection, and closes the socket.
func (d *Detached) Wait() {
	defer d.conn.Close()
	var one [1]byte
	if _, err := d.conn.Read(one[:]); errors.Is(err, io.EOF) {
		return
	}
	_ = d.conn.SetDeadline(time.Now().Add(lingerTimeout))
	if _, err := d.conn.Write(d.last); err != nil {
		return
	}
	if half, ok := d.conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	_, _ = io.Copy(io.Discard, d.conn) // as in Serve
}

// End has Wait return.
func (d *Detached) End() { _ = d.conn.SetReadDeadline(expired) }

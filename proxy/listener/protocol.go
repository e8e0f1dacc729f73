package listener

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// detectTimeout is how long a client may take to send its first bytes.
const detectTimeout = 2 * time.Minute

// preface is how every HTTP/2 connection begins; no method of HTTP/1 does.
const preface = "PRI"

// peekedConn is a connection whose first bytes were read already.
type peekedConn struct {
	net.Conn
	peeked []byte
}

// Read implements net.Conn.
func (c *peekedConn) Read(b []byte) (int, error) {
	if len(c.peeked) > 0 {
		n := copy(b, c.peeked)
		c.peeked = c.peeked[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// detectProtocol distinguishes HTTP/1 from HTTP/2 by the first bytes that the client sends, and
// waits for no more than it takes. It ends with ctx.
func detectProtocol(ctx context.Context, conn net.Conn) (c net.Conn, http1 bool, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(detectTimeout)); err != nil {
		return nil, false, err
	}
	// it may be closed
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	front := make([]byte, 0, len(preface))
	for len(front) < len(preface) && string(front) == preface[:len(front)] {
		n, err := conn.Read(front[len(front):cap(front)])
		front = front[:len(front)+n]
		if err != nil && n == 0 { // an end that comes with the last bytes comes again after them
			if len(front) == 0 {
				return nil, false, errors.Join(errNothingSent, err)
			}
			return nil, false, fmt.Errorf("waiting for the client's first bytes: %w", err)
		}
		if n == 0 {
			return nil, false, io.ErrNoProgress
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	return &peekedConn{conn, front}, string(front) != preface, conn.SetReadDeadline(time.Time{})
}

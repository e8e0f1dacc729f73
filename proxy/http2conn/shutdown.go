package http2conn

import (
	"math"
	"time"

	"golang.org/x/net/http2"
)

// leavingPatience is how long a client may take to say that it has heard. grpc-go waits as long: it may be gone without a word.
const leavingPatience = 5 * time.Second

// GracefulShutdown has the client of a server go elsewhere: it is told twice, as RFC 9113 has it, so that no stream is lost that it opens meanwhile. The connection closes
// with the last stream.
func (c *Conn) GracefulShutdown() {
	c.ending.Store(true)
	c.mu.Lock()
	if !c.closed && !c.leaving {
		c.leaving = true
		_ = c.write.WriteGoAway(math.MaxInt32, http2.ErrCodeNo, []byte("graceful_stop"))
		_ = c.write.WritePing(false, leavingPing)
		c.hears = time.AfterFunc(leavingPatience, func() {
			c.left()
			c.cfg.Handler.FlushNeeded()
		})
	}
	c.mu.Unlock()
}

// left says for good which streams are served.
func (c *Conn) left() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaving && c.goneAt == math.MaxInt32 && !c.closed {
		c.goneAt = c.last
		_ = c.write.WriteGoAway(c.last, http2.ErrCodeNo, []byte("graceful_stop"))
	}
}

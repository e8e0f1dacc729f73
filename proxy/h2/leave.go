package h2

import (
	"math"

	"golang.org/x/net/http2"
)

// Leave has the client of a server go elsewhere: it is told twice, as RFC 9113 has it, so that no stream is lost that it opens meanwhile. The connection closes
// with the last stream.
func (c *Conn) Leave() {
	c.ending.Store(true)
	c.mu.Lock()
	if !c.closed && !c.leaving {
		c.leaving = true
		_ = c.write.WriteGoAway(math.MaxInt32, http2.ErrCodeNo, []byte("graceful_stop"))
		_ = c.write.WritePing(false, leavingPing)
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

package harness

import (
	"bytes"
	"sync"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
)

// Capture searches the traffic of relays for secrets. It is safe for concurrent use.
type Capture struct {
	set *canary.Set

	mu    sync.Mutex
	bytes int64
	found []canary.Finding
}

// NewCapture returns a capture that searches for the values under a rule. It fails the test at its
// end if it finds one.
func (e *Env) NewCapture() *Capture {
	c := &Capture{set: e.Sealed}
	e.TB.Cleanup(func() {
		_, found := c.Result()
		for _, f := range found {
			e.TB.Errorf("a secret was sent: %v", f)
		}
	})
	return c
}

// Result returns how many bytes were searched, and the first findings in them.
func (c *Capture) Result() (int64, []canary.Finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes, c.found
}

// overlap is more than the longest form of a secret: the list of the 32 numbers of a key.
const overlap = 512

// search searches data, which follows rest on its connection. It returns the rest for the next
// call.
func (c *Capture) search(where string, rest, data []byte) []byte {
	all := append(rest, data...)
	found := c.set.Search(where, all)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bytes += int64(len(data))
	if len(c.found) < 10 {
		c.found = append(c.found, found...)
	}
	return bytes.Clone(all[max(0, len(all)-overlap):])
}

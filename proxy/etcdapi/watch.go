package etcdapi

import (
	"sync"
	"sync/atomic"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// watchCall inspects the events of a stream from the first watch on that can meet a rule, and
// never stops: a watch that was cancelled may have events on their way.
type watchCall struct {
	whole
	core      *Core
	id        *listener.Identity
	rules     *RuleSet
	touches   atomic.Bool
	fragments fragments
}

func newWatchCall(c *Core, id *listener.Identity, _ *CallMemory) Call {
	return &watchCall{core: c, id: id, rules: c.Rules.Load()}
}

func (c *watchCall) Request(_ Mode, msg []byte) ([]byte, error) {
	if c.id.Ciphertext {
		return msg, nil
	}
	rules := c.core.Rules.Load()
	w, err := etcdwire.WatchRequest(msg, tryRules{rules})
	if err == nil && w.Creates {
		c.fragments.requested(w.Fragments)
	}
	if rules.empty() {
		return msg, nil
	}
	if err == nil && w.Touches {
		c.touches.Store(true)
	}
	return msg, c.core.status(err, false)
}

func (c *watchCall) Scans() bool {
	return !c.id.Ciphertext && (c.touches.Load() || c.core.Rules.Load() != c.rules)
}

func (c *watchCall) Response(m Mode, dst, msg []byte) ([]byte, error) {
	out, err := etcdwire.WatchResponse(dst, msg, m.Rules(c.core.Rules.Load()))
	return out, c.core.status(err, true)
}

// Splits implements Splitter.
func (c *watchCall) Splits() bool { return c.fragments.active.Load() }

// Split implements Splitter.
func (c *watchCall) Split(msg []byte) ([][]byte, error) {
	fragment, err := c.fragments.accepts(msg)
	if err != nil || !fragment {
		return nil, c.core.status(err, true)
	}
	all, err := etcdwire.Fragments(msg, c.core.MaxRequest+GrpcOverhead)
	return all, c.core.status(err, true)
}

// fragments knows which watches of a stream get their large responses in fragments. etcd cuts them
// by its own limit on requests, which has to be higher behind the proxy, since encrypted values are
// longer: what is too long by the limit that clients know of is cut once more.
//
// etcd answers the requests to create watches in their order, and names the watch in the response.
type fragments struct {
	active atomic.Bool // pending or watches is not empty

	mu sync.Mutex
	// of the creations that are not answered yet: fragments were requested
	pending []bool
	watches map[int64]struct{} // those that get them
}

// requested notes a request to create a watch.
func (f *fragments) requested(fragment bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pending = append(f.pending, fragment)
	f.active.Store(true)
}

// accepts sees a response, and reports whether it may come in fragments.
func (f *fragments) accepts(msg []byte) (bool, error) {
	w, err := etcdwire.WatchedBy(msg)
	if err != nil {
		return false, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if w.Created && len(f.pending) > 0 {
		if f.pending[0] {
			if f.watches == nil {
				f.watches = make(map[int64]struct{})
			}
			f.watches[w.ID] = struct{}{}
		}
		f.pending = f.pending[1:]
	}
	_, fragment := f.watches[w.ID]
	if w.Canceled {
		delete(f.watches, w.ID)
	}
	f.active.Store(len(f.pending)+len(f.watches) > 0)
	return fragment, nil
}

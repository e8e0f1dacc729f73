package proxy

import (
	"sync"
	"sync/atomic"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// watchCall looks into the events of a stream from the first watch on that can meet a rule, and never stops: a watch that was
// cancelled may have events on their way.
type watchCall struct {
	whole
	core      *core
	id        *Identity
	at        *ruleSet
	touches   atomic.Bool
	fragments fragments
}

func newWatchCall(c *core, id *Identity) call {
	return &watchCall{core: c, id: id, at: c.rules.Load()}
}

func (c *watchCall) request(_ mode, msg []byte) ([]byte, error) {
	if c.id.Ciphertext {
		return msg, nil
	}
	rules := c.core.rules.Load()
	w, err := etcdwire.WatchRequest(msg, tryingRules{rules})
	if err == nil && w.Creates {
		c.fragments.asked(w.Fragments)
	}
	if rules.empty() {
		return msg, nil
	}
	if err == nil && w.Touches {
		c.touches.Store(true)
	}
	return msg, c.core.status(err, false)
}

func (c *watchCall) scans() bool {
	return !c.id.Ciphertext && (c.touches.Load() || c.core.rules.Load() != c.at)
}

func (c *watchCall) response(m mode, msg []byte) ([]byte, error) {
	out, err := etcdwire.WatchResponse(msg, m.over(c.core.rules.Load()))
	return out, c.core.status(err, true)
}

// cuts implements cutter.
func (c *watchCall) cuts() bool { return c.fragments.attentive.Load() }

// cut implements cutter.
func (c *watchCall) cut(msg []byte) ([][]byte, error) {
	fragment, err := c.fragments.answered(msg)
	if err != nil || !fragment {
		return nil, c.core.status(err, true)
	}
	all, err := etcdwire.Fragments(msg, c.core.maxRequest+grpcOverhead)
	return all, c.core.status(err, true)
}

// fragments knows which watches of a stream get their large responses in fragments. etcd cuts them by its own limit on requests, which has to be higher behind the
// proxy, since sealed values are longer: what is too long by the limit that clients know of is cut once more.
//
// etcd answers the requests to create watches in their order, and names the watch in the answer.
type fragments struct {
	attentive atomic.Bool // there is something in what follows

	mu      sync.Mutex
	pending []bool             // of the creations that are not answered yet: fragments were asked for
	watches map[int64]struct{} // those that get them
}

// asked notes a request to create a watch.
func (f *fragments) asked(fragment bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pending = append(f.pending, fragment)
	f.attentive.Store(true)
}

// answered sees a response, and says whether it may come in fragments.
func (f *fragments) answered(msg []byte) (bool, error) {
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
	f.attentive.Store(len(f.pending)+len(f.watches) > 0)
	return fragment, nil
}

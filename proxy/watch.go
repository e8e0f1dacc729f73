package proxy

import (
	"context"
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

func (c *watchCall) request(_ context.Context, msg []byte) ([]byte, error) {
	if c.id.Ciphertext {
		return msg, nil
	}
	rules := c.core.rules.Load()
	err := c.fragments.asked(msg)
	if rules.empty() {
		return msg, nil
	}
	if err != nil {
		return nil, c.core.status(err, false)
	}
	if c.touches.Load() {
		return msg, nil
	}
	touches, err := watchTouches(msg, rules)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	if touches {
		c.touches.Store(true)
	}
	return msg, nil
}

func (c *watchCall) scans() bool {
	return !c.id.Ciphertext && (c.touches.Load() || c.core.rules.Load() != c.at)
}

func (c *watchCall) response(ctx context.Context, msg []byte) ([]byte, error) {
	out, err := etcdwire.WatchResponse(ctx, msg, c.core.rules.Load())
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

// asked sees a request.
func (f *fragments) asked(msg []byte) error {
	creates, fragment, err := etcdwire.WatchRequest(msg)
	if err != nil || !creates {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pending = append(f.pending, fragment)
	f.attentive.Store(true)
	return nil
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

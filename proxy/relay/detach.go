package relay

import (
	"context"
	"sync/atomic"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
)

// direction is one direction of a call: its requests or its responses. The mutex of the stream
// guards it.
type direction struct {
	detached atomic.Bool             // written under the mutex
	backlog  []upstreamData          // what has arrived while it is detached
	cancel   context.CancelCauseFunc // of the last goroutine; or nil
}

// detach runs work on a goroutine of its own, and then handles what has arrived for the direction p
// meanwhile. Only the goroutine that handles the direction calls it. work may block.
func (st *clientStream) detach(p *direction, work func(m etcdapi.Mode)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return
	}
	ctx, cancel := context.WithCancelCause(st.session.engine.base)
	p.cancel = cancel
	st.shared.Store(true)
	p.detached.Store(true)
	st.session.work.Go(func() {
		defer cancel(nil)
		ctx := ctx
		if d, err := timeoutOf(st.timeout); err == nil {
			var stop context.CancelFunc
			ctx, stop = context.WithTimeout(ctx, d)
			defer stop()
		}
		m := etcdapi.Blocking(ctx)
		work(m)
		for {
			st.session.flush()
			st.mu.Lock()
			all := p.backlog
			p.backlog = nil
			if len(all) == 0 || st.ended.Load() {
				p.backlog = nil
				p.detached.Store(false)
				st.mu.Unlock()
				return
			}
			st.mu.Unlock()
			for _, next := range all {
				if p == &st.requests {
					st.request(m, next.data, next.end)
				} else {
					st.response.receive(m, next)
				}
			}
		}
	})
}

package relay

import (
	"context"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
)

// direction is a direction of a call that a goroutine of its own has taken over. It is under the
// stream's mu.
type direction struct {
	detached bool
	backlog  []upstreamData          // what has come meanwhile
	cancel   context.CancelCauseFunc // of the last time; nil if there was none
}

// detach has a goroutine of its own do work, and then what comes for the direction p meanwhile. The
// goroutine that calls it is the one that has the direction. work may wait.
func (st *clientStream) detach(p *direction, work func(m etcdapi.Mode)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return
	}
	ctx, cancel := context.WithCancelCause(st.session.engine.base)
	p.detached, p.cancel = true, cancel
	st.session.work.Go(func() {
		defer cancel(nil)
		ctx := ctx
		for _, f := range st.fields {
			if f.Name != "grpc-timeout" {
				continue
			}
			if d, err := timeoutOf(f.Value); err == nil {
				var stop context.CancelFunc
				ctx, stop = context.WithTimeout(ctx, d)
				defer stop()
			}
		}
		m := etcdapi.Blocking(ctx)
		work(m)
		for {
			st.session.flush()
			st.mu.Lock()
			all := p.backlog
			p.backlog = nil
			if len(all) == 0 || st.ended.Load() {
				p.detached, p.backlog = false, nil
				st.mu.Unlock()
				return
			}
			st.mu.Unlock()
			for _, next := range all {
				if p == &st.requests {
					st.Request(m, next.data, next.end)
				} else {
					st.answer(m, next)
				}
			}
		}
	})
}

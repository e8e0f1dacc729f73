package proxy

import "context"

// parking is a direction of a call that a goroutine of its own has taken over. It is under the stream's mu.
type parking struct {
	parked  bool
	backlog []piece                 // what has come meanwhile
	cancel  context.CancelCauseFunc // of the last time; nil if there was none
}

// park has a goroutine of its own do work, and then what comes for the direction p meanwhile. The goroutine that calls it is the one that has the direction. work may wait.
func (st *fstream) park(p *parking, work func(m mode)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return
	}
	ctx, cancel := context.WithCancelCause(st.session.engine.base)
	p.parked, p.cancel = true, cancel
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
		m := blocking(ctx)
		work(m)
		for {
			st.session.flush()
			st.mu.Lock()
			all := p.backlog
			p.backlog = nil
			if len(all) == 0 || st.ended.Load() {
				p.parked, p.backlog = false, nil
				st.mu.Unlock()
				return
			}
			st.mu.Unlock()
			for _, next := range all {
				if p == &st.inward {
					st.request(m, next.data, next.end)
				} else {
					st.answer(m, next)
				}
			}
		}
	})
}

package proxy

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// parking is a direction of a call that a goroutine of its own has taken over. It is under the stream's mu.
type parking struct {
	parked  bool
	backlog []piece                 // what has come meanwhile
	cancel  context.CancelCauseFunc // of the last time; nil if there was none
}

// hasty is the context of who does not wait, see [Sealer].
var hasty = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// wouldWait reports whether err may be for want of time: what a message itself has brought about stays as it is.
func wouldWait(ctx context.Context, err error) bool {
	if ctx != hasty || err == nil {
		return false
	}
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unimplemented, codes.Internal:
		return false
	}
	return true
}

// park has a goroutine of its own do work, and then what comes for the direction p meanwhile. The goroutine that calls it is the one that has the direction. work may wait.
func (st *fstream) park(p *parking, work func(ctx context.Context)) {
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
		work(ctx)
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
					st.request(ctx, next.data, next.end)
				} else {
					st.answer(ctx, next)
				}
			}
		}
	})
}

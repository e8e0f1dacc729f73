package proxy

import (
	"context"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// connect goes on to etcd. waits says that there may be a connection for a context that waits; else, without ok, there is none. Calls that last are worth waiting for one: the reference
// engine would have them for as long.
func (st *fstream) connect(ctx context.Context) (ok, waits bool) {
	lasts := st.method.shape != shapeUnary
	conn, h, hope := st.session.pick()
	if conn == nil && (hope == outlookDialing || hope == outlookDown && lasts) {
		if ctx == hasty {
			return false, true
		}
		st.watch.discard() // this is waiting for etcd
		conn, h = st.session.await(ctx, lasts)
	}
	return conn != nil && st.open(conn, h), false
}

// open opens a stream with the client's header fields, if the client is still there. It reports false if the connection takes none.
func (st *fstream) open(conn *http2conn.Conn, h *hop) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return true
	}
	scheme, authority := st.session.id.to.origin(h.endpoint)
	if st.up = conn.Open(st, upstreamFields(st.fields, scheme, authority), false); st.up == nil {
		return false
	}
	st.method.metrics.started.Inc()
	return true
}

// openOnFirst goes on to the first connection that takes the stream: one may leave, for want of calls, just after it was said to take one. next gives another each time, and nil once
// there are no more. The caller holds mu.
func (st *fstream) openOnFirst(next func() *http2conn.Conn) {
	for st.up == nil {
		conn := next()
		if conn == nil {
			return
		}
		st.local = true
		st.up = conn.Open(st, st.fields, st.silent)
	}
}

// toReference goes on to the reference engine with what the client has sent so far.
func (st *fstream) toReference(raw []byte, end bool) {
	st.watch.discard() // the reference engine measures it
	st.mu.Lock()
	if st.ended.Load() {
		st.mu.Unlock()
		return
	}
	st.openOnFirst(st.session.reference)
	up := st.up
	st.mu.Unlock()
	if up == nil {
		st.fail(errShuttingDown)
		return
	}
	if !st.silent && (end || len(raw) > 0) {
		up.Data(end, nil, raw)
	}
	st.asked = nil
}

package proxy

import (
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// connect opens the stream to etcd. wouldBlock says that there may be a connection for who waits; else, without ok, there is none. Calls that
// last are worth waiting for one.
func (st *fstream) connect(m mode) (ok, wouldBlock bool) {
	lasts := st.method.shape != shapeUnary
	conn, h, hope := st.session.pick()
	if conn == nil && (hope == outlookDialing || hope == outlookDown && lasts) {
		if m.ctx == nil {
			return false, true
		}
		st.watch.discard() // this is waiting for etcd
		conn, h = st.session.await(m.ctx, lasts)
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

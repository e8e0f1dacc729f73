package relay

import (
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// connect opens the stream to etcd. wouldBlock is true in non-blocking mode if there is no
// connection yet. Streams also wait for an endpoint that is down.
func (st *clientStream) connect(m etcdapi.Mode) (ok, wouldBlock bool) {
	lasts := st.method.Shape != etcdapi.ShapeUnary
	conn, h, hope := st.session.pick()
	if conn == nil && (hope == endpointsDialing || hope == endpointsDown && lasts) {
		if m.Ctx == nil {
			return false, true
		}
		st.watch.Discard() // it waits for etcd
		conn, h = st.session.await(m.Ctx, lasts)
	}
	return conn != nil && st.open(conn, h), false
}

// open opens a stream with the client's header fields, if the client is still there. It reports
// false if the connection takes none.
func (st *clientStream) open(conn *http2conn.Conn, h *endpointState) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return true
	}
	scheme, authority := st.session.id.Upstream.Origin(h.url)
	if st.up = conn.Open(st, st.upstreamFields(scheme, authority), false); st.up == nil {
		return false
	}
	st.method.Metrics.Started.Inc()
	return true
}

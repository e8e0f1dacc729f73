package relay

import (
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// unaryRequest is the whole message of a request.
type unaryRequest struct{ head, body []byte }

// connect opens the stream to etcd, with the whole request unless that is nil. wouldBlock is true
// in non-blocking mode if there is no connection yet. Streams also wait for an endpoint
// that is down.
func (st *clientStream) connect(m etcdapi.Mode, r *unaryRequest) (ok, wouldBlock bool) {
	isStream := st.method.Shape != etcdapi.ShapeUnary
	conn, h, state := st.session.pick()
	if conn == nil && (state == endpointsDialing || state == endpointsDown && isStream) {
		if m.Ctx == nil {
			return false, true
		}
		st.watch.Discard() // it waits for etcd
		conn, h = st.session.await(m.Ctx, isStream)
	}
	return conn != nil && st.open(conn, h, r), false
}

// open opens a stream with the client's header fields, if the client is still there. It reports
// false if the connection takes none.
func (st *clientStream) open(conn *http2conn.Conn, h *endpointState, r *unaryRequest) bool {
	fields, last := h.fieldsOf(st), hpack.HeaderField{}
	if st.timeout != "" {
		last = hpack.HeaderField{Name: timeoutName, Value: st.timeout}
	}
	st.mu.Lock()
	opened, sent := st.ended.Load(), false
	if opened { // the client has left meanwhile
		st.mu.Unlock()
		return true
	}
	if st.upMemory.SetValue(st); r == nil {
		opened = conn.OpenOn(&st.upMemory, fields, last)
	} else {
		opened, sent = conn.Request(&st.upMemory, fields, last, r.head, r.body)
	}
	if opened {
		st.up = &st.upMemory
	}
	st.mu.Unlock()
	if !opened {
		return false
	}
	st.method.Metrics.Started.Inc()
	if r != nil {
		st.method.Metrics.Received.Inc()
	}
	if sent {
		st.consumedFromClient()
	}
	return true
}

package relay

import (
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// upstreamConn handles a connection to etcd.
type upstreamConn struct {
	session  *session
	endpoint *endpointState
	conn     *http2conn.Conn
	usable   bool // calls may use it; under the session's mu
	removed  bool // new calls do not use it; under the session's mu
}

var (
	_ http2conn.Handler = (*session)(nil)
	_ http2conn.Handler = (*upstreamConn)(nil)
)

// remove keeps new streams off the connection. The caller holds the session's mu.
func (u *upstreamConn) remove() {
	if u.removed {
		return
	}
	u.removed = true
	switch {
	case !u.usable:
		u.endpoint.failed()
	case u.endpoint.conn == u.conn:
		u.endpoint.conn = nil
	}
	u.session.notifyChanged()
}

// Headers implements [http2conn.Handler].
func (u *upstreamConn) Headers(stream *http2conn.Stream, fields []hpack.HeaderField, end bool) {
	switch st := stream.Value().(type) {
	case *clientStream:
		st.fromUpstream(upstreamData{stream: stream, fields: fields, end: end})
	case *roleCheck:
		st.headers(stream, fields, end)
	}
}

// Data implements [http2conn.Handler].
func (u *upstreamConn) Data(stream *http2conn.Stream, data []byte, end bool) {
	switch st := stream.Value().(type) {
	case *clientStream:
		st.fromUpstream(upstreamData{stream: stream, data: data, end: end})
	case *roleCheck:
		stream.Consumed(len(data))
		if end { // without a trailer, which a server of gRPC does not do
			st.end(st.was)
			stream.Finish()
		}
	}
}

// Reset implements [http2conn.Handler].
func (u *upstreamConn) Reset(stream *http2conn.Stream, code http2.ErrCode) {
	switch st := stream.Value().(type) {
	case *clientStream:
		st.reset(code)
	case *roleCheck:
		st.end(st.was)
	}
}

// Writable implements [http2conn.Handler]: what the client has sent on the stream is on its way.
func (u *upstreamConn) Writable(stream *http2conn.Stream) {
	if st, ok := stream.Value().(*clientStream); ok {
		st.consumedFromClient()
	}
}

// SettingsReceived implements [http2conn.Handler].
func (u *upstreamConn) SettingsReceived() {
	if len(u.session.endpoints) > 1 {
		u.queryRole(false)
	} else { // there is no other member to go to
		u.offer(false)
	}
}

// GoAwayReceived implements [http2conn.Handler].
func (u *upstreamConn) GoAwayReceived() {
	u.session.mu.Lock()
	defer u.session.mu.Unlock()
	u.remove()
}

// FlushNeeded implements [http2conn.Handler].
func (u *upstreamConn) FlushNeeded() { u.session.flush() }

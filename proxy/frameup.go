package proxy

import (
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// upside is the handler of a connection that streams go on to.
type upside struct {
	session *session
	hop     *hop
	conn    *http2conn.Conn
	greeted bool // calls were let go over it; under the session's mu
	gone    bool // no call goes over it any more; under the session's mu
}

var (
	_ http2conn.Handler = (*session)(nil)
	_ http2conn.Handler = (*upside)(nil)
)

// forget has new streams go elsewhere. The caller holds the session's mu.
func (u *upside) forget() {
	if u.gone {
		return
	}
	u.gone = true
	switch {
	case !u.greeted:
		u.hop.failed()
	case u.hop.conn == u.conn:
		u.hop.conn = nil
	}
	u.session.tell()
}

// Headers implements [http2conn.Handler].
func (u *upside) Headers(stream *http2conn.Stream, fields []hpack.HeaderField, end bool) {
	switch st := stream.Value().(type) {
	case *fstream:
		st.out(piece{stream: stream, fields: fields, end: end})
	case *roleCheck:
		st.headers(stream, fields, end)
	}
}

// Data implements [http2conn.Handler].
func (u *upside) Data(stream *http2conn.Stream, data []byte, end bool) {
	switch st := stream.Value().(type) {
	case *fstream:
		st.out(piece{stream: stream, data: data, end: end})
	case *roleCheck:
		stream.Consumed(len(data))
		if end { // without a trailer, which a server of gRPC does not do
			st.end(st.was)
			stream.Finish()
		}
	}
}

// Reset implements [http2conn.Handler].
func (u *upside) Reset(stream *http2conn.Stream, code http2.ErrCode) {
	switch st := stream.Value().(type) {
	case *fstream:
		st.reset(code)
	case *roleCheck:
		st.end(st.was)
	}
}

// Writable implements [http2conn.Handler]: what the client has sent on the stream is on its way.
func (u *upside) Writable(stream *http2conn.Stream) {
	if st, ok := stream.Value().(*fstream); ok {
		st.creditClient()
	}
}

// SettingsReceived implements [http2conn.Handler].
func (u *upside) SettingsReceived() {
	if len(u.session.hops) > 1 {
		u.askRole(false)
	} else { // there is no other member to go to
		u.offer(false)
	}
}

// GoAwayReceived implements [http2conn.Handler].
func (u *upside) GoAwayReceived() {
	u.session.mu.Lock()
	defer u.session.mu.Unlock()
	u.forget()
}

// FlushNeeded implements [http2conn.Handler].
func (u *upside) FlushNeeded() { u.session.flush() }

package proxy

import (
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/h2"
)

// upside is the handler of a connection that streams go on to.
type upside struct {
	session *session
	hop     *hop      // nil for those within the process
	place   **h2.Conn // where the session keeps conn, if it is within the process; under its mu
	conn    *h2.Conn
	greeted bool   // under the session's mu
	kept    []byte // what is being opened, as it came; of the goroutine that reads conn
}

var (
	_ h2.Handler = (*session)(nil)
	_ h2.Handler = (*upside)(nil)
)

// forget has new streams go elsewhere. The caller holds the session's mu.
func (u *upside) forget() {
	switch {
	case u.hop != nil && !u.greeted:
		u.hop.failed()
	case u.hop != nil && u.hop.conn == u.conn:
		u.hop.conn = nil
	case u.hop == nil && *u.place == u.conn:
		*u.place = nil
	}
	u.session.tell()
}

// Headers implements [h2.Handler].
func (u *upside) Headers(stream *h2.Stream, fields []hpack.HeaderField, end bool) {
	if st, ok := stream.Value().(*fstream); ok {
		st.out(piece{side: u, stream: stream, fields: fields, end: end})
	}
}

// Data implements [h2.Handler].
func (u *upside) Data(stream *h2.Stream, data []byte, end bool) {
	if st, ok := stream.Value().(*fstream); ok {
		st.out(piece{side: u, stream: stream, data: data, end: end})
	}
}

// Reset implements [h2.Handler].
func (u *upside) Reset(stream *h2.Stream, code http2.ErrCode) {
	if st, ok := stream.Value().(*fstream); ok {
		st.reset(code)
	}
}

// Sent implements [h2.Handler]: what the client has sent on the stream is on its way.
func (u *upside) Sent(stream *h2.Stream) {
	if st, ok := stream.Value().(*fstream); ok {
		st.creditClient()
	}
}

// Greeted implements [h2.Handler].
func (u *upside) Greeted() {
	if u.hop == nil {
		return
	}
	u.session.mu.Lock()
	defer u.session.mu.Unlock()
	u.greeted = true
	u.hop.conn, u.hop.dialing, u.hop.pause = u.conn, false, 0
	u.session.tell()
}

// Leaving implements [h2.Handler].
func (u *upside) Leaving() {
	u.session.mu.Lock()
	defer u.session.mu.Unlock()
	u.forget()
}

// Idle implements [h2.Handler].
func (u *upside) Idle() { u.session.flush() }

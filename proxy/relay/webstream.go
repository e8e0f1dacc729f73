package relay

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// webStream is a request over HTTP/2 that is not gRPC. The handler of HTTP/1.1 requests serves it,
// on its own goroutine. A webStream is the http.ResponseWriter and the body of the request.
//
// Like etcd, the proxy distinguishes such requests from gRPC by the content type, and only over
// TLS. Without TLS, every request over HTTP/2 is gRPC.
type webStream struct {
	stream   *clientStream
	request  *http.Request
	in       streamInput
	writable chan struct{} // has room for one: what waited for the client was sent
	ctx      context.Context
	cancel   context.CancelFunc
	expects  bool // the client waits for status 100 before it sends the body
	body     webBody

	header  http.Header
	status  int // 0 before WriteHeader
	sent    http.Header
	flushed bool   // the header was sent
	buf     []byte // of the body, before the header is sent
	done    bool   // the handler has returned
}

var (
	_ http.Flusher  = (*webStream)(nil)
	_ io.ReadCloser = (*webStream)(nil)
)

// webBuffer is how many bytes of a response are gathered before its header is sent without a
// length.
const webBuffer = 4 << 10

// unknownBody is how many bytes of a body without a length are read before room is made for the
// longest body.
const unknownBody = 32 << 10

// What a client still sends after the response is read up to these, so that it is not reset in the
// middle of it: some clients report an error then, and not the response. For HTTP/1.1 net/http does
// the same.
const (
	lateBody = 256 << 10 // bytes
	lateWait = 500 * time.Millisecond
)

// release gives bytes from the client back to the window.
func (w *webStream) release(n int) {
	w.stream.client.Consumed(n)
	w.stream.session.flush()
}

// serveWeb has the web handler serve the stream. A client that is not allowed is answered at once.
func serveWeb(st *clientStream, end bool) {
	ctx, cancel := context.WithCancel(listener.WithIdentity(st.session.engine.base, st.session.id))
	w := &webStream{
		stream: st, writable: make(chan struct{}, 1),
		ctx: ctx, cancel: cancel, header: make(http.Header),
	}
	w.in = newStreamInput(w.consumed, nil, end)
	w.body.ctx, w.body.end = context.WithCancel(ctx)
	var err error
	if w.request, err = webRequest(ctx, st.fields, st.session.id.Remote); err != nil {
		cancel()
		st.finish(codes.Internal)
		st.client.Reset(http2.ErrCodeProtocol)
		return
	}
	if w.request.Body = w; end {
		w.request.Body = http.NoBody
	}
	w.body.kept = strings.HasPrefix(w.request.URL.Path, "/v3")
	w.expects = strings.EqualFold(w.request.Header.Get("Expect"), "100-continue")
	if !st.moveTo(w) {
		cancel()
		return
	}
	if st.session.id.Denied {
		w.request.Body = http.NoBody
		w.serve()
		return
	}
	st.session.work.Go(w.serve)
}

// webRequest makes a request of its header fields, which http2conn has checked.
func webRequest(ctx context.Context, fields []hpack.HeaderField, remote string) (*http.Request, error) {
	r := &http.Request{Proto: "HTTP/2.0", ProtoMajor: 2, Header: make(http.Header), ContentLength: -1, RemoteAddr: remote}
	for _, f := range fields {
		switch f.Name {
		case ":method":
			r.Method = f.Value
		case ":path":
			r.RequestURI = f.Value
		case ":authority":
			r.Host = f.Value
		case ":scheme":
		case "content-length":
			if n, err := strconv.ParseUint(f.Value, 10, 63); err == nil {
				r.ContentLength = int64(n)
			}
			r.Header.Add("Content-Length", f.Value)
		default:
			r.Header.Add(textproto.CanonicalMIMEHeaderKey(f.Name), f.Value)
		}
	}
	if r.Host == "" {
		r.Host = r.Header.Get("Host")
	}
	r.Header.Del("Host")
	if cookies := r.Header["Cookie"]; len(cookies) > 1 {
		r.Header.Set("Cookie", strings.Join(cookies, "; "))
	}
	if r.Method == http.MethodConnect {
		r.RequestURI = r.Host
		r.URL = &url.URL{Host: r.Host}
		return r.WithContext(ctx), nil
	}
	var err error
	if r.URL, err = url.ParseRequestURI(r.RequestURI); err != nil {
		return nil, err
	}
	return r.WithContext(ctx), nil
}

// serve runs the handler and ends the response.
func (w *webStream) serve() {
	defer w.cancel()
	defer func() {
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler { //nolint:errorlint // it is no wrapped error
				w.stream.session.engine.log.Error("the handler of a web request panicked")
			}
			w.abort()
		}
	}()
	w.stream.session.engine.web.ServeHTTP(w, w.request)
	w.finish()
}

// abort ends a response that is not whole.
func (w *webStream) abort() {
	if w.stream.finish(codes.Internal) {
		w.stream.client.Reset(http2.ErrCodeInternal)
		w.stream.session.flush()
	}
}

// finish sends what is left of the response, once the body of the request was read.
func (w *webStream) finish() {
	if w.request.Body != http.NoBody && !w.expects {
		limited, cancel := context.WithTimeout(w.ctx, lateWait)
		if w.body.kept { // no longer
			w.body.kept = false
			w.release(w.body.read)
		}
		// whatever comes
		_, _ = io.CopyN(io.Discard, readerFunc(func(b []byte) (int, error) { return w.in.read(limited, b) }), lateBody)
		cancel()
	}
	w.done = true
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	trailer := w.trailer()
	if !w.flushed {
		body := w.buf
		w.buf = nil
		empty := len(body) == 0 || w.request.Method == http.MethodHead
		if !w.sendHeader(int64(len(body)), body, empty && len(trailer) == 0) {
			return
		}
		if !empty && !w.sendData(body, len(trailer) == 0) {
			return
		}
		if len(trailer) == 0 {
			w.stream.session.flush()
			return
		}
	}
	if !w.stream.finish(codes.OK) {
		return
	}
	if len(trailer) > 0 {
		w.stream.client.Headers(trailer, true)
	} else {
		w.stream.client.Data(true, nil, nil)
	}
	w.stream.session.flush()
}

type readerFunc func([]byte) (int, error)

// Read implements io.Reader.
func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// trailer returns the fields that follow the body: those that the header has announced, and those
// that a handler marks.
func (w *webStream) trailer() []hpack.HeaderField {
	var fields []hpack.HeaderField
	add := func(name string, values []string) {
		for _, v := range values {
			fields = append(fields, hpack.HeaderField{Name: strings.ToLower(name), Value: v})
		}
	}
	for _, list := range w.sent["Trailer"] {
		for name := range strings.SplitSeq(list, ",") {
			name = textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name))
			add(name, w.header[name])
		}
	}
	for name, values := range w.header {
		if rest, ok := strings.CutPrefix(name, http.TrailerPrefix); ok {
			add(rest, values)
		}
	}
	return fields
}

// Header implements http.ResponseWriter.
func (w *webStream) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *webStream) WriteHeader(status int) {
	if w.status != 0 || status < 200 {
		return
	}
	w.status, w.sent = status, w.header.Clone()
}

// bodyAllowed reports whether a response may have a body.
func (w *webStream) bodyAllowed() bool {
	return w.status != http.StatusNoContent && w.status != http.StatusNotModified
}

// Write implements http.ResponseWriter.
func (w *webStream) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	switch {
	case !w.bodyAllowed():
		return 0, http.ErrBodyNotAllowed
	case w.ctx.Err() != nil:
		return 0, w.ctx.Err()
	case !w.flushed && len(w.buf)+len(b) <= webBuffer:
		w.buf = append(w.buf, b...)
		return len(b), nil
	case !w.flushed && !w.flushHeader(b):
		return 0, context.Canceled
	case w.request.Method == http.MethodHead:
		return len(b), nil
	case !w.sendData(b, false):
		return 0, context.Canceled
	}
	return len(b), nil
}

// Flush implements http.Flusher.
func (w *webStream) Flush() {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	if !w.flushed {
		w.flushHeader(nil)
	}
	w.stream.session.flush()
}

// flushHeader sends the header and what was gathered of the body; next is what follows.
func (w *webStream) flushHeader(next []byte) bool {
	body := w.buf
	w.buf = nil
	sniffed := body
	if len(sniffed) == 0 {
		sniffed = next
	}
	if !w.sendHeader(-1, sniffed, false) {
		return false
	}
	return len(body) == 0 || w.request.Method == http.MethodHead || w.sendData(body, false)
}

// sendHeader sends the header. length is that of the whole body, if it is known and not negative,
// and body its front, which tells the content type that the handler has not.
func (w *webStream) sendHeader(length int64, body []byte, end bool) bool {
	w.flushed = true
	fields := make([]hpack.HeaderField, 0, len(w.sent)+4)
	fields = append(fields, hpack.HeaderField{Name: ":status", Value: strconv.Itoa(w.status)})
	names := make([]string, 0, len(w.sent))
	for name := range w.sent {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if strings.HasPrefix(name, http.TrailerPrefix) || isHopByHop(name) {
			continue
		}
		for _, v := range w.sent[name] {
			fields = append(fields, hpack.HeaderField{Name: strings.ToLower(name), Value: v})
		}
	}
	_, typed := w.sent["Content-Type"]
	if !typed && w.sent.Get("Content-Encoding") == "" && w.bodyAllowed() && len(body) > 0 {
		fields = append(fields, hpack.HeaderField{Name: "content-type", Value: http.DetectContentType(body)})
	}
	if _, known := w.sent["Content-Length"]; !known && length >= 0 && w.bodyAllowed() && (length > 0 || w.request.Method != http.MethodHead) {
		fields = append(fields, hpack.HeaderField{Name: "content-length", Value: strconv.FormatInt(length, 10)})
	}
	if _, ok := w.sent["Date"]; !ok {
		fields = append(fields, hpack.HeaderField{Name: "date", Value: time.Now().UTC().Format(http.TimeFormat)})
	}
	if end && !w.stream.finish(codes.OK) || w.stream.ended.Load() && !end {
		return false
	}
	w.stream.client.Headers(fields, end)
	return true
}

// isHopByHop reports whether a header field is one of HTTP/1 connections, which HTTP/2 has none
// of.
func isHopByHop(name string) bool {
	switch name {
	case "Connection", "Proxy-Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade":
		return true
	}
	return false
}

// sendData sends a part of the body, once the client has taken what was sent before. It reports
// whether the client is still there.
func (w *webStream) sendData(b []byte, end bool) bool {
	for w.stream.client.HasQueued() {
		w.stream.session.flush()
		select {
		case <-w.writable:
		case <-w.ctx.Done():
			return false
		}
	}
	if end && !w.stream.finish(codes.OK) || w.stream.ended.Load() && !end {
		return false
	}
	w.stream.client.Data(end, nil, b)
	return true
}

// Read implements io.Reader for the body of the request.
func (w *webStream) Read(b []byte) (int, error) {
	if w.expects {
		w.expects = false
		if !w.flushed && !w.stream.ended.Load() {
			w.stream.client.Headers([]hpack.HeaderField{{Name: ":status", Value: "100"}}, false)
			w.stream.session.flush()
		}
	}
	w.expect()
	n, err := w.in.read(w.body.ctx, b)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, errBodyEnded
	}
	return n, err
}

// webBody is how much of a request's body was read. The JSON gateway keeps a body until it has
// decoded it, like a message of gRPC: until the handler returns, it counts as received by the
// stream. All other handlers pass it on at once. Only the goroutine of the handler uses it, but for
// end.
type webBody struct {
	ctx      context.Context // of its reads
	end      context.CancelFunc
	kept     bool
	read     int
	expected bool // Expect was called
}

// consumed is called with how many bytes were read of the body.
func (w *webStream) consumed(n int) {
	if w.body.read += n; !w.body.kept {
		w.release(n)
	}
}

// expect opens the flow-control window for the rest of a body that is kept: for as much as its
// header says, or for the longest that the gateway takes.
func (w *webStream) expect() {
	b := &w.body
	if !b.kept || b.expected {
		return
	}
	longest := 2*w.stream.session.engine.maxMessage + webBuffer // so that one byte too many can come
	rest := longest - b.read - w.in.buffered()
	switch length := w.request.ContentLength; {
	case length >= 0:
		rest -= longest - int(min(int64(longest), length))
	case b.read < unknownBody:
		return // most end before
	}
	b.expected = true
	if rest > 0 {
		w.stream.client.Expect(rest)
		w.stream.session.flush()
	}
}

var errBodyEnded = errors.New("the client has left")

// SetReadDeadline implements what [http.ResponseController] calls. It supports no other deadline
// than one that has passed: then the handler can read no more of the body.
func (w *webStream) SetReadDeadline(t time.Time) error {
	if t.IsZero() || time.Now().Before(t) {
		return http.ErrNotSupported
	}
	w.body.end()
	return nil
}

// Close implements io.Closer for the body of the request.
func (*webStream) Close() error { return nil }

// data implements streamHandler.
func (w *webStream) data(data []byte, end bool) { w.in.add(data, end) }

// drained implements streamHandler.
func (w *webStream) drained() {
	select {
	case w.writable <- struct{}{}:
	default:
	}
}

// clientGone implements streamHandler.
func (w *webStream) clientGone() { w.cancel() }

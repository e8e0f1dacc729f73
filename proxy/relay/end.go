package relay

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"syscall"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// finish ends the call with a code, which is counted. It reports false if the call had ended.
func (st *clientStream) finish(code codes.Code) bool {
	if st.ended.Swap(true) {
		return false
	}
	st.mu.Lock()
	in, out, counts, started := st.requests.cancel, st.responses.cancel, st.method != nil && st.served == nil, st.up != nil
	st.mu.Unlock()
	for _, cancel := range []context.CancelCauseFunc{in, out} {
		if cancel != nil {
			cancel(nil)
		}
	}
	st.session.admission.release(st)
	if counts && !started { // it ends before it went anywhere
		st.method.Metrics.Started.Inc()
	}
	if counts {
		st.method.Metrics.End(code)
	}
	return true
}

// cancelUpstream resets the stream to etcd.
func (st *clientStream) cancelUpstream() {
	st.mu.Lock()
	up := st.up
	st.mu.Unlock()
	if up != nil {
		up.Reset(http2.ErrCodeCancel)
	}
}

// clientGone ends the call after the client has reset the stream, or its connection has ended.
func (st *clientStream) clientGone() {
	if st.finish(codes.Canceled) {
		st.cancelUpstream()
		if h := st.handler(); h != nil {
			h.clientGone()
		}
	}
}

// fail ends the call with a status of the proxy's own.
func (st *clientStream) fail(err error) { st.refuse(http.StatusOK, err) }

// refuse ends the call with a status of gRPC's and, if no header was sent yet, one of HTTP.
func (st *clientStream) refuse(httpStatus int, err error) {
	s := status.Convert(err)
	if !st.finish(s.Code()) {
		return
	}
	fields := make([]hpack.HeaderField, 0, 5)
	st.mu.Lock()
	begun := st.begun
	st.mu.Unlock()
	if !begun {
		fields = append(fields, hpack.HeaderField{Name: ":status", Value: strconv.Itoa(httpStatus)}, hpack.HeaderField{Name: "content-type", Value: st.responseType})
	}
	st.client.Headers(rpc.StatusFields(fields, s), true)
	st.cancelUpstream()
}

// reset ends the call after etcd has reset its stream.
func (st *clientStream) reset(code http2.ErrCode) {
	if st.finish(codes.Unavailable) {
		st.client.Reset(code)
	}
}

// upstreamLost ends the call after the connection to etcd has ended. It reports false if the client
// was sent a part of a message: no status would reach it then, see [session.serveUp].
func (st *clientStream) upstreamLost(cause error) bool {
	if st.partial.Load() && st.finish(codes.Unavailable) {
		return false
	}
	if errno := syscall.Errno(0); errors.As(cause, &errno) {
		cause = errno // clients are told what, as by etcd, and not where etcd is
	}
	err := status.Errorf(codes.Unavailable, "error reading from server: %v", cause)
	st.mu.Lock()
	begun := st.begun
	st.mu.Unlock()
	if !begun {
		err = rpc.Error(codes.Unavailable, "etcd is unreachable: "+status.Convert(err).Message())
	}
	st.fail(err)
	return true
}

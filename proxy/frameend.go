package proxy

import (
	"context"
	"encoding/base64"
	"errors"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// finish says once that the call is over, with the code that is counted.
func (st *fstream) finish(code codes.Code) bool {
	if st.ended.Swap(true) {
		return false
	}
	st.mu.Lock()
	in, out, counts, started := st.inward.cancel, st.outward.cancel, st.method != nil && !st.local, st.up != nil
	st.mu.Unlock()
	for _, cancel := range []context.CancelCauseFunc{in, out} {
		if cancel != nil {
			cancel(nil)
		}
	}
	if counts && !started { // it ends before it went anywhere
		st.method.metrics.started.Inc()
	}
	if counts {
		st.method.metrics.end(code)
	}
	return true
}

// leaveUp has etcd hear no more of a call.
func (st *fstream) leaveUp() {
	st.mu.Lock()
	up := st.up
	st.mu.Unlock()
	if up != nil {
		up.Reset(http2.ErrCodeCancel)
	}
}

// left is the client's end of the call: it has reset the stream, or its connection has ended.
func (st *fstream) left() {
	if st.finish(codes.Canceled) {
		st.leaveUp()
	}
}

// fail ends the call with a status of the proxy's own.
func (st *fstream) fail(err error) {
	s := status.Convert(err)
	if !st.finish(s.Code()) {
		return
	}
	if st.web {
		st.failWeb()
		return
	}
	fields := make([]hpack.HeaderField, 0, 5)
	st.mu.Lock()
	begun := st.begun
	st.mu.Unlock()
	if !begun {
		fields = append(fields, hpack.HeaderField{Name: ":status", Value: "200"}, hpack.HeaderField{Name: "content-type", Value: contentType})
	}
	fields = append(fields, hpack.HeaderField{Name: "grpc-status", Value: strconv.Itoa(int(s.Code()))}, hpack.HeaderField{Name: "grpc-message", Value: percent(s.Message())})
	if p := s.Proto(); len(p.GetDetails()) > 0 {
		if b, err := proto.Marshal(p); err == nil {
			fields = append(fields, hpack.HeaderField{Name: "grpc-status-details-bin", Value: base64.RawStdEncoding.EncodeToString(b)})
		}
	}
	st.client.Headers(fields, true)
	st.leaveUp()
}

// reset is etcd's end of the call, without a status.
func (st *fstream) reset(code http2.ErrCode) {
	if st.finish(codes.Unavailable) {
		st.client.Reset(code)
	}
}

// lost ends a call whose connection has ended.
func (st *fstream) lost(why error) {
	if errno := syscall.Errno(0); errors.As(why, &errno) {
		why = errno // clients are told what, as by etcd, and not where etcd is
	}
	if st.isLocal() { // the reference engine goes with the proxy alone
		st.fail(errShuttingDown)
		return
	}
	err := status.Errorf(codes.Unavailable, "error reading from server: %v", why)
	st.mu.Lock()
	begun := st.begun
	st.mu.Unlock()
	if !begun {
		err = ownError(codes.Unavailable, "etcd is unreachable: "+status.Convert(err).Message())
	}
	st.fail(err)
}

// percent encodes a status message for its header, as gRPC has it.
func percent(text string) string {
	const hexDigits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(text) {
		if c := text[i]; c >= ' ' && c <= '~' && c != '%' {
			b.WriteByte(c)
		} else {
			b.Write([]byte{'%', hexDigits[c>>4], hexDigits[c&15]})
		}
	}
	return b.String()
}

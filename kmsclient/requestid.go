package kmsclient

import (
	"context"
	"strings"
	"sync/atomic"
)

// maxRequestID limits a request ID, in bytes; the known ones have 36.
const maxRequestID = 128

// requestIDKey is the context key of a call's *requestID.
type requestIDKey struct{}

// requestID is where a backend stores the request ID of the current attempt.
type requestID struct {
	last atomic.Pointer[string]
	// of the context that the wrapper was called with; nil unless that was made by WithRequestID
	caller *requestID
}

// NoteRequestID records the KMS' own ID of an answered request, in the context that the wrapper
// passed to a backend. The last one counts. A failed request's ID belongs into [Error]. It ignores
// what cannot be an ID: anything but 1 to 128 printable ASCII characters without spaces.
//
// It may be called concurrently, with any context; it ignores one that is not from the wrapper.
func NoteRequestID(ctx context.Context, id string) {
	r, ok := ctx.Value(requestIDKey{}).(*requestID)
	if !ok || id == "" || len(id) > maxRequestID || strings.IndexFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) >= 0 {
		return
	}
	for ; r != nil; r = r.caller {
		r.last.Store(&id)
	}
}

// WithRequestID returns a context to call a [Client] with, and a function that returns the KMS' own
// ID of the last answered request of such a call, or "". Both may be used concurrently.
func WithRequestID(ctx context.Context) (context.Context, func() string) {
	ctx, r := withRequestID(ctx)
	return ctx, r.get
}

// withRequestID returns a context that NoteRequestID writes to, and what was written.
func withRequestID(ctx context.Context) (context.Context, *requestID) {
	r := new(requestID)
	r.caller, _ = ctx.Value(requestIDKey{}).(*requestID)
	return context.WithValue(ctx, requestIDKey{}, r), r
}

func (r *requestID) get() string {
	if id := r.last.Load(); id != nil {
		return *id
	}
	return ""
}

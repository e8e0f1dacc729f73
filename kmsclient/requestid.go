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

// requestID is where a backend leaves the request ID of the attempt under way.
type requestID struct{ last atomic.Pointer[string] }

// NoteRequestID tells the wrapper, which gave ctx to a backend, the KMS' own id of a request that was answered. The last one counts. A failed
// request's id belongs into [Error]. What cannot be an id (it is not 1 to 128 printable characters of ASCII, or has a space) is dropped.
//
// It may be called concurrently, with any context; one that no wrapper made is left alone.
func NoteRequestID(ctx context.Context, id string) {
	r, ok := ctx.Value(requestIDKey{}).(*requestID)
	if !ok || id == "" || len(id) > maxRequestID || strings.IndexFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) >= 0 {
		return
	}
	r.last.Store(&id)
}

// withRequestID returns a context that NoteRequestID writes to, and what was written.
func withRequestID(ctx context.Context) (context.Context, *requestID) {
	r := new(requestID)
	return context.WithValue(ctx, requestIDKey{}, r), r
}

func (r *requestID) get() string {
	if id := r.last.Load(); id != nil {
		return *id
	}
	return ""
}

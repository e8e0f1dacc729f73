package gateway

import (
	"context"
	"errors"
	"io"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/sync/semaphore"
)

// bodyBudget limits how many bytes the unfinished bodies and unfinished websocket messages of all
// connections take together. What does not fit is not read, so that flow control delays the client.
// It is safe for concurrent use.
type bodyBudget struct {
	room    *semaphore.Weighted
	longest int64 // of a body or message, in bytes
	waiting atomic.Int64
}

const (
	// freeBody is how many bytes of a body or message are read without a reservation, so that
	// ordinary requests never wait.
	freeBody = 32 << 10
	// reservationTime is how long a reservation is kept while others wait.
	reservationTime = 10 * time.Second
)

// errBodyLate is the error of a body that takes too long while others wait.
var errBodyLate = errors.New("the request took too long to arrive while other requests wait for its memory")

// newBodyBudget returns a budget for bodies of up to longest bytes, of which one always fits.
func newBodyBudget(longest int64) *bodyBudget {
	const most = 64 << 20 // decoders take several times as much
	size := max(longest, min(most, debug.SetMemoryLimit(-1)/8))
	return &bodyBudget{room: semaphore.NewWeighted(size), longest: longest}
}

// reservation is the part of a budget that one body has. It is safe for concurrent use.
type reservation struct {
	budget *bodyBudget
	expire func() // ends a body that takes too long; called at most once

	mu       sync.Mutex
	size     int64 // 0 without one
	complete bool  // nothing more is read
	expired  bool
	timer    *time.Timer
}

// acquire reserves n bytes, and waits until they fit.
func (r *reservation) acquire(ctx context.Context, n int64) error {
	r.budget.waiting.Add(1)
	defer r.budget.waiting.Add(-1)
	if err := r.budget.room.Acquire(ctx, n); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.size = n
	r.timer = time.AfterFunc(reservationTime, r.check)
	return nil
}

// check runs at the end of every reservationTime. If others wait, it ends a body that is not
// complete. One that is complete, or was ended, belongs to a call that may wait for hours, like
// that of an election: it no longer counts.
func (r *reservation) check() {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.size == 0:
		return
	case r.complete || r.expired:
		r.free()
		return
	case r.budget.waiting.Load() > 0:
		r.expired = true
		r.expire()
	}
	r.timer.Reset(reservationTime)
}

// missing reports whether nothing is reserved for a body that is still read.
func (r *reservation) missing() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.size == 0 && !r.complete && !r.expired
}

// finish notes that nothing more is read of the body.
func (r *reservation) finish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.complete = true
}

// late reports whether the body was ended because it took too long.
func (r *reservation) late() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.expired
}

// release gives the bytes back, if there are any. The body is not ended from then on.
func (r *reservation) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.size > 0 {
		r.free()
	}
}

// free gives the bytes back. The caller holds mu.
func (r *reservation) free() {
	r.timer.Stop()
	r.budget.room.Release(r.size)
	r.size = 0
}

// limit has bodies wait for the budget. A body counts until its handler returns; a stream of JSON
// values counts only while one of them is unfinished.
func (b *bodyBudget) limit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		known := r.ContentLength >= 0
		if r.Body == nil || r.Body == http.NoBody || known && r.ContentLength <= freeBody || websocket.IsWebSocketUpgrade(r) {
			next.ServeHTTP(w, r)
			return
		}
		body := &budgetBody{Closer: r.Body, streams: takesStream(r.URL.Path)}
		reserved := reservation{budget: b, expire: func() {
			// it is closed if this fails
			_ = http.NewResponseController(w).SetReadDeadline(time.Unix(1, 0))
		}}
		defer reserved.release()
		body.budgetReader = budgetReader{Reader: r.Body, ctx: r.Context(), free: freeBody, need: b.longest, reserved: &reserved}
		if known && !body.streams {
			body.free, body.need = 0, min(b.longest, r.ContentLength)
		}
		limited := *r
		limited.Body = body
		next.ServeHTTP(w, &limited)
	})
}

// takesStream reports whether the body of a request with this path is a stream of JSON values, each
// of which is decoded when it is complete.
func takesStream(path string) bool { return path == "/v3/watch" || path == "/v3/lease/keepalive" }

// budgetReader reads a body or a message. It makes a reservation before it reads more than a part
// that is free.
type budgetReader struct {
	io.Reader
	ctx        context.Context
	free       int64 // bytes that need no reservation
	need       int64 // bytes to reserve
	unfinished int64 // bytes that were read and count
	reserved   *reservation
}

// Read implements io.Reader.
func (b *budgetReader) Read(p []byte) (int, error) {
	if free := b.free - b.unfinished; free > 0 {
		b.reserved.release() // the decoder has decoded what it was for
		p = p[:min(int64(len(p)), free)]
	} else if b.reserved.missing() {
		if err := b.reserved.acquire(b.ctx, b.need); err != nil {
			return 0, err
		}
	}
	n, err := b.Reader.Read(p)
	b.unfinished += int64(n)
	return n, err
}

// budgetBody is the body of a request.
type budgetBody struct {
	budgetReader
	io.Closer
	streams bool     // JSON values
	value   jsonSize // of a stream
}

// Read implements io.Reader.
func (b *budgetBody) Read(p []byte) (int, error) {
	n, err := b.budgetReader.Read(p)
	if b.streams {
		b.value.add(p[:n])
		b.unfinished = b.value.n
	}
	switch {
	case errors.Is(err, io.EOF):
		b.reserved.finish()
	case err != nil && b.reserved.late():
		err = errBodyLate
	}
	return n, err
}

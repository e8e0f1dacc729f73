package relay

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
)

// Limits of relayed unary calls that etcd has not begun to answer. Clients that send calls faster
// than etcd answers them wait for each other, and all others would wait with them in etcd.
const (
	mostCalls  = 512 // of all clients, before a client is limited to its share
	clientCall = 4   // that each client's connection may always have
	waitingMax = 64  // that wait, before the connection is not read for a while
)

// pauseMax is how long a connection is not read at a time, so that a client can cancel calls and is
// answered pings while etcd answers nothing.
const pauseMax = time.Second

// admission decides when a session sends its unary calls to etcd.
type admission struct {
	all *atomic.Int64 // calls of all sessions

	mu       sync.Mutex
	calls    atomic.Int64    // of this session
	waiting  []*clientStream // in this order
	live     atomic.Int64    // of waiting, that have not ended; written under mu
	draining bool            // a goroutine sends what waits
	resume   chan struct{}
	closed   bool
}

// admit reports whether a call with the request raw may be sent now. Otherwise its stream waits,
// and is forwarded when another call of the session is answered or ends.
func (a *admission) admit(st *clientStream, raw []byte) bool {
	if a.live.Load() == 0 && a.free() {
		a.take(st)
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.live.Add(1)
	if a.live.Load() == 1 && a.free() { // a call has ended before it could see this one
		a.live.Add(-1)
		a.take(st)
		return true
	}
	if len(st.pending) == 0 {
		st.pending = bytes.Clone(raw)
	}
	st.watch.Discard() // it waits for etcd
	st.shared.Store(true)
	st.admission.Store(admissionWaits)
	if len(a.waiting) > 2*int(a.live.Load()) {
		a.waiting = slices.DeleteFunc(a.waiting, func(st *clientStream) bool { return st.admission.Load() != admissionWaits })
	}
	a.waiting = append(a.waiting, st)
	return false
}

func (a *admission) free() bool { return a.calls.Load() < clientCall || a.all.Load() < mostCalls }

func (a *admission) take(st *clientStream) {
	st.admission.Store(admissionTaken)
	a.calls.Add(1)
	a.all.Add(1)
}

// undoTake is the opposite of take. It reports whether the call was taken.
func (a *admission) undoTake(st *clientStream) bool {
	taken := st.admission.CompareAndSwap(admissionTaken, admissionNone)
	if taken {
		a.calls.Add(-1)
		a.all.Add(-1)
	}
	return taken
}

// States of a call, see [clientStream].
const (
	admissionNone = iota
	admissionWaits
	admissionTaken
)

// release is called when a call was answered, or has ended. It forwards calls that wait.
func (a *admission) release(st *clientStream) {
	if st.admission.Load() == admissionNone || a.undoTake(st) && a.live.Load() == 0 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if st.admission.CompareAndSwap(admissionWaits, admissionNone) {
		a.live.Add(-1)
	} else {
		a.undoTake(st) // it was taken meanwhile
	}
	if a.draining {
		return
	}
	a.draining = true
	for len(a.waiting) > 0 && !a.closed && a.free() {
		next := a.waiting[0]
		a.waiting[0] = nil
		if a.waiting = a.waiting[1:]; next.admission.Load() != admissionWaits {
			continue
		}
		a.live.Add(-1)
		a.take(next)
		a.mu.Unlock()
		next.forward(etcdapi.NonBlocking, next.pending)
		a.mu.Lock()
	}
	a.draining = false
	if a.resume != nil && a.live.Load() < waitingMax {
		close(a.resume)
		a.resume = nil
	}
}

// pause waits while many calls wait.
func (a *admission) pause() {
	if a.live.Load() < waitingMax {
		return
	}
	a.mu.Lock()
	if a.live.Load() < waitingMax || a.closed {
		a.mu.Unlock()
		return
	}
	resume := make(chan struct{})
	a.resume = resume // one goroutine reads the connection
	a.mu.Unlock()
	timer := time.NewTimer(pauseMax)
	defer timer.Stop()
	select {
	case <-resume:
	case <-timer.C:
	}
}

// Close has calls that wait never be sent: the session has ended.
func (a *admission) Close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed, a.waiting = true, nil
}

package relay

import (
	"sync"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// maxEnded is how many ended streams a connection keeps for later ones. A client has few calls open
// on a connection at a time.
const maxEnded = 32

// streamMemory has the streams of a client that later streams of the same client use, so that a
// relayed call allocates nothing.
//
// A goroutine that still refers to an ended stream would act on another call. So only a stream is
// used again to which no goroutine referred but two, and neither does any more: the goroutine that
// reads from etcd puts a stream here when it has handled the last frame of the response, and the
// goroutine that reads from the client takes it when it begins the next one, and so has left all
// frames of the former one behind. All other streams are left to the garbage collector: those that
// had a goroutine of their own, that waited for a flow-control window or for other calls, and that
// did not end with etcd's trailer.
type streamMemory struct {
	unused []*clientStream // of the goroutine that reads from the client

	mu    sync.Mutex
	ended []*clientStream
}

// put has a stream be used again that has ended with etcd's trailer. It drops what the stream holds
// of its request. The caller, which reads from etcd, does not use the stream any more. The
// goroutine that reads from the client may: it does not use what is dropped here once the request
// was sent.
func (m *streamMemory) put(st *clientStream) {
	if st.shared.Load() || !st.client.Unused() || !st.upMemory.Unused() {
		return
	}
	st.fields, st.repeated, st.timeout, st.call = nil, nil, "", nil
	st.callMemory = etcdapi.CallMemory{}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.ended) < maxEnded {
		m.ended = append(m.ended, st)
	}
}

// newStream returns the next stream of the client.
func (s *session) newStream() *http2conn.Stream {
	m := &s.memory
	if len(m.unused) == 0 {
		m.mu.Lock()
		m.ended, m.unused = m.unused, m.ended
		m.mu.Unlock()
	}
	var st *clientStream
	if n := len(m.unused) - 1; n >= 0 && !s.engine.draining.Load() { // draining has lists of streams
		st, m.unused[n] = m.unused[n], nil
		m.unused = m.unused[:n]
		*st = clientStream{}
	} else {
		st = new(clientStream)
	}
	st.session, st.client = s, &st.clientMemory
	st.client.SetValue(st)
	return st.client
}

package proxy

import (
	"context"
	"encoding/base64"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"
)

// frameEngine moves the frames of HTTP/2 between a client's connection and connections of its own to etcd: one to each endpoint, which nobody else uses. What a call
// carries is looked into by the same calls as in the reference engine.
//
// It does what is done often. Everything else goes on to the reference engine, over a connection within the process, as the client has sent it: methods that need decoded
// messages, clients that are denied, compressed messages, whatever is odd about a request, and every request while etcd is not connected. So there is one place that
// decides about those, and what they are answered is the same from either engine.
type frameEngine struct {
	ref     *grpcEngine
	core    *core
	log     *slog.Logger
	drain   time.Duration
	methods map[string]*grpcMethod // those that go this way, by path
	web     func(*clientConn)      // serves what is none of gRPC; may be nil
	base    context.Context        // of everything that waits; it ends with the engine
	cancel  context.CancelFunc

	leaving  atomic.Bool // draining has begun
	mu       sync.Mutex
	sessions map[*session]struct{}
	draining bool
	empty    chan struct{} // closed once draining and without sessions
	all      sync.WaitGroup
}

var _ engine = (*frameEngine)(nil)

// takesFrames says which methods do not need the reference engine: those that carry no value, and those whose values are rewritten where they stand.
func (m *method) takesFrames() bool {
	return m.class == classPass && m.service != "grpc.health.v1.Health" || m.class == classCheck || m.class == classRewrite
}

// newFrameEngine makes an engine before ref. If it is reference, no call takes frames, and connections that carry gRPC alone go to ref whole.
func newFrameEngine(ref *grpcEngine, reference bool) *frameEngine {
	e := &frameEngine{
		ref: ref, core: ref.core, log: ref.log, drain: ref.drainTimeout,
		methods: make(map[string]*grpcMethod), sessions: make(map[*session]struct{}), empty: make(chan struct{}),
	}
	e.base, e.cancel = context.WithCancel(context.Background())
	for _, m := range ref.served {
		if m.takesFrames() && !reference {
			e.methods[m.full] = m
		}
	}
	return e
}

// serve implements engine.
func (e *frameEngine) serve(conn *clientConn) {
	if len(e.methods) == 0 && conn.plain {
		e.ref.serve(conn)
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.draining {
		_ = conn.Close()
		return
	}
	s := newSession(e, conn)
	e.sessions[s] = struct{}{}
	e.all.Go(func() {
		s.run()
		e.mu.Lock()
		defer e.mu.Unlock()
		if delete(e.sessions, s); e.draining && len(e.sessions) == 0 {
			close(e.empty)
		}
	})
}

// run implements engine.
func (e *frameEngine) run(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- e.ref.run(ctx) }()
	var err error
	select {
	case <-ctx.Done():
		e.leave()
		err = <-done
	case err = <-done: // it failed
	}
	e.close()
	e.all.Wait()
	return err
}

// leave asks all clients to go elsewhere, and waits for them as long as the drain may take.
func (e *frameEngine) leave() {
	e.leaving.Store(true)
	e.mu.Lock()
	e.draining = true
	all := make([]*session, 0, len(e.sessions))
	for s := range e.sessions {
		all = append(all, s)
	}
	if len(all) == 0 {
		close(e.empty)
	}
	e.mu.Unlock()
	for _, s := range all {
		e.all.Go(s.leave)
	}
	timer := time.NewTimer(e.drain)
	defer timer.Stop()
	select {
	case <-e.empty:
	case <-timer.C:
		e.log.Warn("calls did not finish in time and were ended", "drainTimeout", e.drain)
	}
}

// close implements engine.
func (e *frameEngine) close() {
	e.cancel()
	e.mu.Lock()
	e.draining = true
	for s := range e.sessions {
		go s.client.Close() // over TLS it may take a moment, and each waits for its own
	}
	e.mu.Unlock()
	e.ref.close()
}

// route says by its header fields whether a call goes this way, and whose it is.
func (e *frameEngine) route(id *Identity, fields []hpack.HeaderField) *grpcMethod {
	if id.Denied {
		return nil
	}
	if e.core.gate != nil {
		select {
		case <-e.core.gate:
		default:
			return nil
		}
	}
	var m *grpcMethod
	posted, typed := false, false
	for _, f := range fields {
		switch f.Name {
		case ":method":
			posted = f.Value == "POST"
		case ":path":
			m = e.methods[f.Value]
		case "content-type":
			typed = f.Value == contentType || f.Value == contentType+"+proto"
		case "grpc-encoding":
			if f.Value != "identity" {
				return nil
			}
		case "grpc-timeout":
			if timeoutOf(f.Value) == 0 {
				return nil
			}
		case meantForEtcd, "connection", "host":
			return nil
		default:
			if strings.HasSuffix(f.Name, "-bin") && !isBinary(f.Value) {
				return nil
			}
		}
	}
	if !posted || !typed || m != nil && !id.mayCall(m.method) {
		return nil
	}
	return m
}

const contentType = "application/grpc"

// upstreamFields makes of a client's header fields those for etcd. What belongs to the hop stays behind.
func upstreamFields(fields []hpack.HeaderField, scheme, authority string) []hpack.HeaderField {
	kept := make([]hpack.HeaderField, 0, len(fields)+1)
	for _, f := range fields {
		switch f.Name {
		case ":scheme":
			f.Value = scheme
		case ":authority":
			f.Value = authority
		case "grpc-encoding", "grpc-accept-encoding", "accept-encoding", "host", "content-length":
			continue
		}
		kept = append(kept, f)
	}
	return append(kept, hpack.HeaderField{Name: meantForEtcd, Value: markOfEtcd[0]})
}

// isBinary reports whether gRPC takes a value for base64.
func isBinary(v string) bool {
	encoding := base64.RawStdEncoding
	if len(v)%4 == 0 {
		encoding = base64.StdEncoding
	}
	_, err := encoding.DecodeString(v)
	return err == nil
}

// timeoutOf returns how long a call may take, by the header field that says so; 0: it does not say so, or nothing.
func timeoutOf(field string) time.Duration {
	if len(field) < 2 || len(field) > 9 {
		return 0
	}
	unit := map[byte]time.Duration{
		'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond,
	}[field[len(field)-1]]
	n, err := strconv.ParseUint(field[:len(field)-1], 10, 63)
	if err != nil || unit == 0 {
		return 0
	}
	return time.Duration(min(n, uint64(math.MaxInt64/unit))) * unit //nolint:gosec // 63 bits
}

package proxy

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// sessionArena is an engine with a model of etcd behind it, which sessions are run against.
type sessionArena struct {
	proxy      *running
	store      atomic.Pointer[lockedStore]
	kv         pb.KVClient // an honest client
	heap       uint64      // in use before the first session
	goroutines int
	runs       int
}

// lockedStore is a model of etcd's store for concurrent use.
type lockedStore struct {
	mu sync.Mutex
	*etcdmodel.Store
}

func doIn[R proto.Message](a *sessionArena, tb testing.TB, request proto.Message) (response R, err error) {
	s := a.store.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := proxytest.CheckSealed(a.proxy.core.Rules.Load(), request); err != nil {
		tb.Error(err)
	}
	got, err := s.Do(request)
	if err != nil {
		return response, err
	}
	return got.(R), nil
}

func newSessionArena(tb testing.TB) *sessionArena {
	tb.Helper()
	a := new(sessionArena)
	a.reset()
	etcd := proxytest.ServeFake(tb, &proxytest.FakeEtcd{
		RangeFn: func(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
			return doIn[*pb.RangeResponse](a, tb, r)
		},
		PutFn: func(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
			return doIn[*pb.PutResponse](a, tb, r)
		},
		DeleteFn: func(_ context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
			return doIn[*pb.DeleteRangeResponse](a, tb, r)
		},
		TxnFn: func(_ context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
			return doIn[*pb.TxnResponse](a, tb, r)
		},
		StreamFn: func(r *pb.RangeRequest, s grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
			// as etcd
			if r.GetSortTarget() != pb.RangeRequest_KEY || r.GetSortOrder() != pb.RangeRequest_NONE {
				return status.Error(codes.Unimplemented, "RangeStream does not support custom sort orders")
			}
			got, err := doIn[*pb.RangeResponse](a, tb, r)
			if err != nil {
				return err
			}
			return s.Send(&pb.RangeStreamResponse{RangeResponse: got})
		},
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			for {
				r, err := s.Recv()
				if err != nil {
					return nil //nolint:nilerr // the client has left
				}
				if err := s.Send(&pb.WatchResponse{Created: r.GetCreateRequest() != nil, Canceled: r.GetCancelRequest() != nil, Header: &pb.ResponseHeader{Revision: 1}}); err != nil {
					return err
				}
			}
		},
		KeepAlive: func(s grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
			for {
				r, err := s.Recv()
				if err != nil {
					return nil //nolint:nilerr // the client has left
				}
				if err := s.Send(&pb.LeaseKeepAliveResponse{ID: r.GetID(), TTL: 5}); err != nil {
					return err
				}
			}
		},
	})
	a.proxy = startProxy(tb, etcd, systemRules(), func(c *Config) { c.MaxRequestBytes = 256 << 10 })
	a.kv = pb.NewKVClient(proxytest.Dial(tb, a.proxy.Addrs()[0].String(), grpc.WithTransportCredentials(proxytest.InsecureCredentials())))
	a.honest(tb)
	a.goroutines, a.heap = runtime.NumGoroutine(), a.heapInUse()
	return a
}

func (a *sessionArena) reset() {
	a.store.Store(&lockedStore{Store: etcdmodel.New(etcdmodel.MaxOps, etcdmodel.Leases...)})
}

func (*sessionArena) heapInUse() uint64 {
	runtime.GC()
	runtime.GC() // what pools kept
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// honest fails if another client is not served.
func (a *sessionArena) honest(tb testing.TB) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(context.Background(), nil), time.Minute)
	defer cancel()
	if _, err := a.kv.Put(ctx, &pb.PutRequest{Key: []byte("s/honest"), Value: []byte("value")}, grpc.WaitForReady(true)); err != nil {
		tb.Fatalf("an honest client: %v", err)
	}
	if r, err := a.kv.Range(ctx, &pb.RangeRequest{Key: []byte("s/honest")}); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "value" {
		tb.Fatalf("an honest client: %v, %v", r, err)
	}
}

// Limits of what a session may leave behind.
const (
	leftGoroutines = 20
	leftHeap       = 32 << 20
)

// mutatorHeap is what the mutator of package testing keeps for its inputs in a process that fuzzes.
func mutatorHeap() uint64 {
	if f := flag.Lookup("test.fuzzworker"); f != nil && f.Value.String() == "true" {
		return 100 << 20
	}
	return 0
}

// Run runs a session and checks that nothing of it is left.
func (a *sessionArena) Run(tb testing.TB, program []byte) {
	tb.Helper()
	a.reset()
	s := newFrameSession(program)
	near, far := s.connect(tb)
	served := a.accept(far, s.secure, s.denied)
	s.talk(tb, near)
	select {
	case <-served:
	case <-time.After(time.Minute):
		tb.Fatal("the session does not end with its connection")
	}
	for deadline := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > a.goroutines+leftGoroutines; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			tb.Fatalf("%d goroutines, before %d:\n%s", runtime.NumGoroutine(), a.goroutines, stacks[:runtime.Stack(stacks, true)])
		}
	}
	if a.runs++; a.runs%100 == 0 {
		a.honest(tb)
		if now := a.heapInUse(); now > a.heap+leftHeap+mutatorHeap() {
			tb.Fatalf("after %d sessions %d MiB are in use, before %d MiB", a.runs, now>>20, a.heap>>20)
		}
	}
}

// accept hands a connection to the engine, as a listener does.
func (a *sessionArena) accept(conn net.Conn, secure, denied bool) (closed <-chan struct{}) {
	l := a.proxy.listeners[0]
	w := writebuffer.New(conn)
	done := make(chan struct{})
	a.proxy.engine.Serve(&listener.Conn{
		Conn: w, WriteBuffer: w, Plaintext: !secure, OnClose: sync.OnceFunc(func() { close(done) }),
		Identity: &listener.Identity{Listener: l.Config.Address, Remote: "192.0.2.1:1", Denied: denied, Upstream: l.Upstream},
	})
	return done
}

// frameSession is a client that a program, which is any bytes, makes frames of.
type frameSession struct {
	program              []byte
	secure, denied, pipe bool // over TLS, not on the allow-list, not over TCP
	reads, leaves        bool // reads what the proxy sends; leaves in the middle
	piece                int  // bytes that are written at once

	out    bytes.Buffer
	framer *http2.Framer
	block  bytes.Buffer
	enc    *hpack.Encoder
	last   uint32 // stream
}

func newFrameSession(program []byte) *frameSession {
	s := &frameSession{program: program}
	flags := s.next()
	s.secure, s.denied, s.pipe, s.reads, s.leaves = flags&1 > 0, flags&6 == 6, flags&8 > 0, flags&48 > 0, flags&64 > 0
	s.piece = 1 + int(s.next())*int(s.next())
	s.framer = http2.NewFramer(&s.out, nil)
	s.framer.AllowIllegalWrites = true
	s.enc = hpack.NewEncoder(&s.block)
	return s
}

// next takes a byte of the program, and 0 after its end.
func (s *frameSession) next() byte {
	if len(s.program) == 0 {
		return 0
	}
	b := s.program[0]
	s.program = s.program[1:]
	return b
}

// number takes a number whose magnitude is random.
func (s *frameSession) number() uint32 {
	n := uint32(s.next())
	return n<<(s.next()%24) | uint32(s.next())
}

// bytes takes up to n bytes.
func (s *frameSession) bytes(n int) []byte {
	b := s.program[:min(n, len(s.program))]
	s.program = s.program[len(b):]
	return b
}

// stream is mostly one that is open.
func (s *frameSession) stream() uint32 {
	switch b := s.next(); {
	case b < 128:
		return s.last
	case b < 224:
		return max(1, s.last-2*uint32(b%8))
	case b < 240:
		return s.last + 1
	case b < 248:
		return 0
	default:
		return s.number()
	}
}

// fuzzedMethods are what streams call.
var fuzzedMethods = []string{
	"/etcdserverpb.KV/Range", "/etcdserverpb.KV/Put", "/etcdserverpb.KV/Txn", "/etcdserverpb.KV/DeleteRange", "/etcdserverpb.KV/RangeStream",
	"/etcdserverpb.Watch/Watch", "/etcdserverpb.Lease/LeaseKeepAlive", "/etcdserverpb.Cluster/MemberList", "/v3electionpb.Election/Campaign",
	"/v3lockpb.Lock/Lock", "/grpc.health.v1.Health/Check", "/etcdserverpb.Maintenance/Snapshot", "/etcdserverpb.KV/Unknown", "/v3/kv/range", "/version", "",
}

// fuzzedRequests are requests of some of them.
var fuzzedRequests = func() (all [][]byte) {
	key, value := []byte("s/key"), bytes.Repeat([]byte("value"), 20)
	put := &pb.PutRequest{Key: key, Value: value}
	for _, m := range []proto.Message{
		&pb.RangeRequest{Key: key}, put, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, SortTarget: pb.RangeRequest_VALUE, SortOrder: pb.RangeRequest_DESCEND},
		&pb.TxnRequest{
			Compare: []*pb.Compare{{Key: key, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: value}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: put}}},
			Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}}},
		},
		&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: key}}},
		&pb.LeaseKeepAliveRequest{ID: 1}, &pb.PutRequest{Key: key, Value: make([]byte, 100_000)},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			panic(err)
		}
		all = append(all, append(rpc.Header(len(b)), b...))
	}
	return all
}()

// fields are the header fields of a request, most often good ones.
func (s *frameSession) fields() []hpack.HeaderField {
	all := []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: fuzzedMethods[int(s.next())%len(fuzzedMethods)]},
		{Name: ":authority", Value: "a"}, {Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
	}
	odd := s.next()
	more := [...]hpack.HeaderField{
		{Name: "grpc-encoding", Value: "gzip"}, {Name: "grpc-timeout", Value: "1m"}, {Name: "x-bin", Value: "!"}, {Name: "content-length", Value: "7"},
		{Name: "connection", Value: "close"}, {Name: "host", Value: "b"}, {Name: "authorization", Value: "token"}, {Name: "Upper", Value: "\n"},
	}
	switch {
	case odd < 128:
	case odd < 192:
		all = append(all, more[odd%8])
	case odd < 224:
		i := int(odd) % len(all)
		all = append(all[:i], all[i+1:]...)
	case odd < 240:
		all[odd%6].Value = string(s.bytes(8))
	default:
		for range int(odd) * 20 {
			all = append(all, hpack.HeaderField{Name: "a"})
		}
	}
	return all
}

func (s *frameSession) coded(fields []hpack.HeaderField) []byte {
	s.block.Reset()
	for _, f := range fields {
		_ = s.enc.WriteField(f) // to memory
	}
	return s.block.Bytes()
}

// frame writes one step of the program.
func (s *frameSession) frame() {
	f := s.framer
	switch op := s.next() % 20; op {
	case 0, 1, 2, 3, 4: // a call
		s.last += 2 - (s.last+1)%2 // the next odd one
		end := s.next() > 200
		_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: s.last, BlockFragment: s.coded(s.fields()), EndHeaders: true, EndStream: end})
	case 5, 6, 7, 8: // a message, whole or in pieces
		id, message, end := s.stream(), fuzzedRequests[int(s.next())%len(fuzzedRequests)], s.next() < 128
		for piece := 1 + int(s.number()%16384); len(message) > 0; {
			part := message[:min(piece, len(message))]
			message = message[len(part):]
			_ = f.WriteDataPadded(id, end && len(message) == 0, part, make([]byte, s.next()%4))
		}
	case 9:
		_ = f.WriteData(s.stream(), s.next() > 128, s.bytes(int(s.next())))
	case 10:
		_ = f.WriteRSTStream(s.stream(), http2.ErrCode(s.next()%16))
	case 11:
		_ = f.WriteWindowUpdate(s.stream(), s.number())
	case 12:
		_ = f.WriteSettings(http2.Setting{ID: http2.SettingID(s.next() % 8), Val: s.number()}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: s.number()})
	case 13:
		_ = f.WritePing(s.next() > 128, [8]byte(append(s.bytes(8), make([]byte, 8)...)))
	case 14:
		_ = f.WritePriority(s.stream(), http2.PriorityParam{StreamDep: s.stream(), Weight: s.next()})
	case 15:
		_ = f.WriteGoAway(s.stream(), http2.ErrCode(s.next()%16), s.bytes(4))
	case 16: // a block in frames, perhaps without its end
		s.last += 2
		block, end := s.coded(s.fields()), s.next() < 200
		cut := int(s.next()) % (len(block) + 1)
		_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: s.last, BlockFragment: block[:cut], EndStream: s.next() > 200})
		_ = f.WriteContinuation(s.last, end, block[cut:])
	case 17: // a trailer
		_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: s.stream(), BlockFragment: s.coded([]hpack.HeaderField{{Name: "x", Value: "y"}}), EndHeaders: true, EndStream: s.next() < 200})
	case 18:
		_ = f.WriteRawFrame(http2.FrameType(s.next()%12), http2.Flags(s.next()), s.stream(), s.bytes(int(s.next())))
	case 19:
		if s.next() > 240 {
			s.out.Write(s.bytes(9))
		}
	}
}

func (s *frameSession) connect(tb testing.TB) (near, far net.Conn) {
	tb.Helper()
	if s.pipe {
		return net.Pipe()
	}
	l := proxytest.ListenLoopback(tb)
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	if far, err = l.Accept(); err != nil {
		tb.Fatal(err)
	}
	return near, far
}

// talk runs the program over the connection and closes it.
func (s *frameSession) talk(tb testing.TB, conn net.Conn) {
	defer conn.Close()
	s.out.WriteString(http2.ClientPreface)
	if s.next() < 250 {
		_ = s.framer.WriteSettings()
	}
	for steps := 0; len(s.program) > 0 && steps < 200; steps++ {
		s.frame()
	}
	ended := []byte("the end.")
	_ = s.framer.WritePing(false, [8]byte(ended))
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		if s.reads {
			s.read(tb, conn, [8]byte(ended))
		}
	}()
	// what is not read may never be taken
	_ = conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	for out := s.out.Bytes(); len(out) > 0; {
		n, err := conn.Write(out[:min(s.piece, len(out))])
		if out = out[n:]; err != nil || s.leaves && len(out) < s.out.Len()/2 {
			break
		}
	}
	if !s.leaves {
		// a block without an end has no answer
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		<-heard
	}
	_ = conn.Close()
	<-heard
}

// read reads frames until the answer to the last ping, and fails if they are no HTTP/2.
func (s *frameSession) read(tb testing.TB, conn io.Reader, last [8]byte) {
	f := http2.NewFramer(nil, conn)
	f.SetMaxReadFrameSize(1<<24 - 1)
	for {
		frame, err := f.ReadFrame()
		if _, bad := errors.AsType[http2.ConnectionError](err); bad {
			tb.Errorf("what the proxy sends is not HTTP/2: %v", err)
		}
		if err != nil {
			return
		}
		if ping, ok := frame.(*http2.PingFrame); ok && ping.IsAck() && ping.Data == last {
			return
		}
	}
}

// randomSession is a program of random bytes. Every other one has small bytes alone, which mostly
// make valid frames.
func randomSession(seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	program := make([]byte, 50+r.IntN(1000))
	most := uint32(128 << (seed % 2))
	for i := range program {
		program[i] = byte(r.Uint32N(most))
	}
	return program
}

// TestSessions runs random sessions for SESSIONS_TIME, two seconds by default, one after the other.
func TestSessions(t *testing.T) {
	limit, err := time.ParseDuration(os.Getenv("SESSIONS_TIME"))
	if err != nil {
		limit = 2 * time.Second
	}
	a := newSessionArena(t)
	seed := rand.Uint64() >> 1
	for end := time.Now().Add(limit); time.Now().Before(end) && !t.Failed(); seed++ {
		a.Run(t, randomSession(seed))
		if t.Failed() {
			t.Logf("the seed is %d", seed)
		}
	}
	a.runs = 99
	a.Run(t, nil) // which checks the memory
	t.Logf("until seed %d", seed)
}

// FuzzSessions fails if a session of valid, odd and broken frames ends the process, leaves
// goroutines or memory behind, or keeps another client from being served.
func FuzzSessions(f *testing.F) {
	for seed := range uint64(40) {
		f.Add(randomSession(seed))
	}
	a := newSessionArena(f)
	f.Fuzz(func(t *testing.T, program []byte) { a.Run(t, program) })
}

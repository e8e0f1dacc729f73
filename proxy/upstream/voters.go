package upstream

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// voters keeps the calls of one client of etcd's library off learners. A call that a learner has
// refused is made once more on another endpoint: the learner refuses before it inspects a call,
// so even a write cannot be done twice. With the first refusal the endpoints that are learners are
// taken out of the client's list, until they are promoted.
type voters struct {
	endpoints []string
	client    atomic.Pointer[clientv3.Client] // nil until it is made

	mu       sync.Mutex
	polling  bool          // the endpoints are queried now and then
	querying chan struct{} // closed when they were queried; nil while they are not
	hasVoter bool          // at the last time, an endpoint answered that is no learner
}

// voterAttempts is how often a call is made at most where learners refuse it. Calls that began
// before the learners were taken out of the list may meet them twice.
const voterAttempts = 5

// bufferedRequests is how many bytes of a stream's requests are kept at most until its first
// answer, to be sent once more. A stream with more than that is not made again.
const bufferedRequests = 64 << 10

// options are for the client. Of one endpoint there is nothing to choose.
func (v *voters) options() []grpc.DialOption {
	if len(v.endpoints) < 2 {
		return nil
	}
	return []grpc.DialOption{grpc.WithChainUnaryInterceptor(v.unary), grpc.WithChainStreamInterceptor(v.stream)}
}

func (v *voters) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if method == healthpb.Health_Check_FullMethodName { // which is how learners are found
		return invoke(ctx, method, req, reply, cc, opts...)
	}
	request := newReplayable(req)
	defer request.free()
	for n := 1; ; n++ {
		err := request.send(func(msg any) error { return invoke(ctx, method, msg, reply, cc, opts...) })
		if !refusedByLearner(err) || n == voterAttempts || !v.avoidLearners(ctx) {
			return err
		}
	}
}

// avoidLearners takes learners out of the client's list of endpoints. It reports whether others are
// left.
func (v *voters) avoidLearners(ctx context.Context) bool {
	client := v.client.Load()
	if client == nil {
		return false
	}
	v.mu.Lock()
	if !v.polling {
		v.polling, v.querying = true, make(chan struct{})
		go v.followRoles(client)
	}
	querying := v.querying
	v.mu.Unlock()
	if querying != nil {
		select {
		case <-querying:
		case <-ctx.Done():
			return false
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.hasVoter
}

// followRoles asks the endpoints, and continues to ask them now and then while one of them is a
// learner. It ends with the client.
func (v *voters) followRoles(client *clientv3.Client) {
	for {
		learners, others := v.queryRoles(client)
		ended := client.Ctx().Err() != nil
		if !ended {
			v.setEndpoints(client, learners, others)
		}
		v.mu.Lock()
		close(v.querying)
		v.querying, v.hasVoter, v.polling = nil, others && !ended, len(learners) > 0 && !ended
		again := v.polling
		v.mu.Unlock()
		if !again {
			return
		}
		select {
		case <-client.Ctx().Done():
		case <-time.After(RoleInterval):
		}
		v.mu.Lock()
		v.querying = make(chan struct{})
		v.mu.Unlock()
	}
}

// queryRoles asks each endpoint whether it is a learner. others says that one answered and is none.
func (v *voters) queryRoles(client *clientv3.Client) (learners []string, others bool) {
	ctx, cancel := context.WithTimeout(client.Ctx(), RoleTimeout)
	defer cancel()
	results := make([]error, len(v.endpoints))
	var all sync.WaitGroup
	for i, endpoint := range v.endpoints {
		all.Go(func() {
			conn, err := client.Dial(endpoint)
			if err == nil {
				defer conn.Close()
				out := new(rpc.Message)
				defer out.Free()
				err = conn.Invoke(metadata.AppendToOutgoingContext(ctx, MarkHeader, MarkValue[0]), healthpb.Health_Check_FullMethodName,
					new(rpc.Message), out, grpc.ForceCodecV2(rpc.Codec{}), grpc.WaitForReady(true))
			}
			results[i] = err
		})
	}
	all.Wait()
	for i, err := range results {
		switch code := status.Code(err); {
		case refusedByLearner(err):
			learners = append(learners, v.endpoints[i])
		case code != codes.Unavailable && code != codes.DeadlineExceeded && code != codes.Canceled:
			others = true
		}
	}
	return learners, others
}

// setEndpoints has the client go to the endpoints that are no learners; to all if none of those is
// there.
func (v *voters) setEndpoints(client *clientv3.Client, learners []string, others bool) {
	want := v.endpoints
	if others {
		want = slices.DeleteFunc(slices.Clone(want), func(e string) bool { return slices.Contains(learners, e) })
	}
	if !slices.Equal(client.Endpoints(), want) {
		client.SetEndpoints(want...)
	}
}

// replayable is a request that can be sent more than once. The one that it was made of stays its
// owner's.
type replayable struct {
	msg  any         // nil for a frame
	data rpc.Message // another reference to the bytes of a frame
}

func newReplayable(msg any) *replayable {
	f, ok := msg.(*rpc.Message)
	if !ok {
		return &replayable{msg: msg}
	}
	k := &replayable{data: rpc.Message{Data: f.Data}}
	k.data.Data.Ref()
	return k
}

// send calls f with the request.
func (k *replayable) send(f func(msg any) error) error {
	if k.msg != nil {
		return f(k.msg)
	}
	again := &rpc.Message{Data: k.data.Data}
	again.Data.Ref()
	defer again.Free() // unless the codec took it
	return f(again)
}

func (k *replayable) free() { k.data.Free() }

func (v *voters) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	open := func() (grpc.ClientStream, error) { return streamer(ctx, desc, cc, method, opts...) }
	first, err := open()
	if err != nil {
		return nil, err
	}
	return &voterStream{ClientStream: first, voters: v, ctx: ctx, open: open}, nil
}

// voterStream is a stream that is opened again, with the requests that were sent, if the first
// thing it brings is the refusal of a learner. As with every stream, one goroutine may send and
// another receive.
type voterStream struct {
	grpc.ClientStream // the one of the moment; replaced under mu by who receives
	voters            *voters
	ctx               context.Context
	open              func() (grpc.ClientStream, error)
	attempts          int
	headerErr         error       // of the header, for the next receive
	settled           atomic.Bool // it is not opened again

	mu     sync.Mutex
	sent   []*replayable
	bytes  int
	closed bool // the client has nothing more to say
}

// SendMsg implements [grpc.ClientStream].
func (s *voterStream) SendMsg(m any) error {
	s.mu.Lock()
	if s.settled.Load() {
		s.dropSent()
		current := s.ClientStream
		s.mu.Unlock()
		return current.SendMsg(m)
	}
	defer s.mu.Unlock()
	k := newReplayable(m)
	s.sent = append(s.sent, k)
	if s.bytes += k.data.Data.Len(); s.bytes > bufferedRequests {
		s.settled.Store(true)
	}
	err := k.send(s.ClientStream.SendMsg)
	if errors.Is(err, io.EOF) { // the receiver opens the stream once more, or is told why it ended
		return nil
	}
	return err
}

// CloseSend implements [grpc.ClientStream].
func (s *voterStream) CloseSend() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return s.ClientStream.CloseSend()
}

// Header implements [grpc.ClientStream].
func (s *voterStream) Header() (metadata.MD, error) {
	for {
		header, err := s.ClientStream.Header()
		if header != nil || err != nil || s.settled.Load() {
			return header, err
		}
		// It has ended without one: its status is there already.
		end := s.ClientStream.RecvMsg(new(rpc.Message))
		if !s.reopen(end) {
			s.headerErr = end
			return nil, nil
		}
	}
}

// RecvMsg implements [grpc.ClientStream].
func (s *voterStream) RecvMsg(m any) error {
	if err := s.headerErr; err != nil {
		return err
	}
	for {
		err := s.ClientStream.RecvMsg(m)
		if s.settled.Load() || !s.reopen(err) {
			return err
		}
	}
}

// reopen opens the stream once more if err is a learner's refusal, and there is another member.
// Otherwise the stream stays what it is.
func (s *voterStream) reopen(err error) bool {
	s.attempts++
	again := refusedByLearner(err) && s.attempts < voterAttempts && s.voters.avoidLearners(s.ctx)
	if !again {
		s.settled.Store(true)
		if s.mu.TryLock() { // else the sender does it
			s.dropSent()
			s.mu.Unlock()
		}
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	next, err := s.open()
	if err != nil {
		s.settled.Store(true)
		return false
	}
	s.ClientStream = next
	for _, k := range s.sent {
		if k.send(next.SendMsg) != nil { // the next receive says why
			return true
		}
	}
	if s.closed {
		_ = next.CloseSend() // never fails
	}
	return true
}

// dropSent lets go of what was kept. The caller holds mu.
func (s *voterStream) dropSent() {
	for _, k := range s.sent {
		k.free()
	}
	s.sent = nil
}

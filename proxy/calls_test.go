package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

var everything = []etcdapi.Rule{{Prefix: "", Sealer: proxytest.Reverser{}}}

func detailed(t *testing.T, code codes.Code, text string) error {
	t.Helper()
	st, err := status.New(code, text).WithDetails(durationpb.New(42 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestUnaryIsExact(t *testing.T) {
	want := detailed(t, codes.FailedPrecondition, "etcdserver: no space: ü %41")
	var got metadata.MD
	fail := false
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{RangeFn: func(ctx context.Context, _ *pb.RangeRequest) (*pb.RangeResponse, error) {
		got, _ = metadata.FromIncomingContext(ctx)
		if err := grpc.SetTrailer(ctx, metadata.Pairs("t", "1", "t", "2", "t-bin", "\x00\xff")); err != nil {
			return nil, err
		}
		if fail {
			return nil, want
		}
		if err := grpc.SetHeader(ctx, metadata.Pairs("h", "1", "h", "2", "h-bin", "\x00\xff")); err != nil {
			return nil, err
		}
		return &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 7}, Kvs: []*mvccpb.KeyValue{{Key: []byte("k"), Value: proxytest.Sealed("k", "v")}}}, nil
	}})
	for _, rules := range [][]etcdapi.Rule{nil, everything} {
		conn := startProxy(t, etcd, rules, nil).dial(t, grpc.WithUserAgent("me"))
		sent := metadata.Pairs("token", "tok", "authorization", "auth", "hasleader", "true", "client-api-version", "3.7", "x-bin", "\x00\x01", "x", "a", "x", "b")
		ctx := metadata.NewOutgoingContext(proxytest.TestContext(t), sent)
		var header, trailer metadata.MD
		fail = false
		resp, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("k")}, grpc.Header(&header), grpc.Trailer(&trailer))
		if err != nil {
			t.Fatal(err)
		}
		value := "v"
		if rules == nil {
			value = string(proxytest.Sealed("k", "v"))
		}
		if string(resp.Kvs[0].Value) != value || resp.Header.Revision != 7 {
			t.Errorf("got %v", resp)
		}
		for k, v := range sent {
			if diff := cmp.Diff(v, got[k]); diff != "" {
				t.Errorf("metadata %s (-want +got):\n%s", k, diff)
			}
		}
		for _, md := range []metadata.MD{header, trailer} {
			for k, v := range metadata.Pairs("t", "1", "t", "2", "t-bin", "\x00\xff", "h", "1", "h", "2", "h-bin", "\x00\xff") {
				if have, ok := md[k]; ok && !cmp.Equal(v, have) {
					t.Errorf("metadata %s: %q, want %q", k, have, v)
				}
			}
		}
		if len(header["h"]) != 2 || len(trailer["t"]) != 2 || len(header["content-type"]) != 1 {
			t.Errorf("header %v, trailer %v", header, trailer)
		}
		fail, header, trailer = true, nil, nil
		_, err = pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("k")}, grpc.Header(&header), grpc.Trailer(&trailer))
		proxytest.SameStatus(t, err, want)
		if len(header) != 0 || len(trailer["t-bin"]) != 1 {
			t.Errorf("after an error: header %v, trailer %v", header, trailer)
		}
	}
}

func TestStreamIsExact(t *testing.T) {
	want := detailed(t, codes.OutOfRange, "etcdserver: mvcc: required revision is a future revision")
	release := make(chan struct{})
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{StreamFn: func(_ *pb.RangeRequest, s grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
		if err := s.SendHeader(metadata.Pairs("early", "yes")); err != nil {
			return err
		}
		<-release
		for i := range 3 {
			k := fmt.Sprint("k", i)
			r := &pb.RangeStreamResponse{RangeResponse: &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: []byte(k), Value: proxytest.Sealed(k, "v")}}}}
			if err := s.Send(r); err != nil {
				return err
			}
		}
		s.SetTrailer(metadata.Pairs("late", "yes"))
		return want
	}})
	conn := startProxy(t, etcd, everything, nil).dial(t)
	s, err := pb.NewKVClient(conn).RangeStream(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")})
	if err != nil {
		t.Fatal(err)
	}
	header, err := s.Header() // comes while the server holds the first message back
	if err != nil || len(header["early"]) != 1 {
		t.Fatalf("header %v, %v", header, err)
	}
	close(release)
	for range 3 {
		r, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if v := r.RangeResponse.Kvs[0].Value; string(v) != "v" {
			t.Errorf("got %q", v)
		}
	}
	_, err = s.Recv()
	proxytest.SameStatus(t, err, want)
	if len(s.Trailer()["late"]) != 1 {
		t.Errorf("trailer %v", s.Trailer())
	}
}

func TestRangeStreamUnknownToEtcd(t *testing.T) {
	// An etcd before 3.7 does not know the method; its client learns that at the first receive.
	old := grpc.ServiceDesc{ServiceName: "etcdserverpb.KV", HandlerType: (*any)(nil)}
	l := proxytest.ListenLoopback(t)
	s := grpc.NewServer()
	s.RegisterService(&old, nil)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	conn := startProxy(t, l.Addr().String(), everything, nil).dial(t)
	stream, err := pb.NewKVClient(conn).RangeStream(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")})
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	proxytest.SameStatus(t, err, status.Error(codes.Unimplemented, "unknown method RangeStream for service etcdserverpb.KV"))
}

func TestUnknownMethods(t *testing.T) {
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{})
	proxied := startProxy(t, etcd, everything, nil).dial(t)
	direct := proxytest.DialInsecure(t, etcd)
	for _, m := range []string{"/etcdserverpb.KV/Scan", "/etcdserverpb.Nope/Range", "/a/b/c"} {
		_, want := proxytest.RawCall(proxytest.TestContext(t), direct, m, nil)
		_, got := proxytest.RawCall(proxytest.TestContext(t), proxied, m, nil)
		if status.Code(got) != codes.Unimplemented {
			t.Errorf("%s: %v", m, got)
		}
		proxytest.SameStatus(t, got, want)
	}
}

func TestCancellationReachesEtcd(t *testing.T) {
	arrived, gone := make(chan struct{}, 2), make(chan error, 2)
	hang := func(ctx context.Context) error {
		arrived <- struct{}{}
		<-ctx.Done()
		gone <- ctx.Err()
		return ctx.Err()
	}
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		RangeFn: func(ctx context.Context, _ *pb.RangeRequest) (*pb.RangeResponse, error) { return nil, hang(ctx) },
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error { return hang(s.Context()) },
	})
	conn := startProxy(t, etcd, everything, nil).dial(t)

	ctx, cancel := context.WithCancel(proxytest.TestContext(t))
	failed := make(chan error, 1)
	go func() {
		_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("k")})
		failed <- err
	}()
	proxytest.Wait(t, arrived, "request")
	cancel()
	proxytest.Wait(t, gone, "cancellation of a unary call")
	if err := proxytest.Wait(t, failed, "answer"); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}

	ctx, cancel = context.WithCancel(proxytest.TestContext(t))
	s, err := pb.NewWatchClient(conn).Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	proxytest.Wait(t, arrived, "stream")
	cancel()
	proxytest.Wait(t, gone, "cancellation of a stream")
	if _, err := s.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}
}

func TestDeadlineReachesEtcd(t *testing.T) {
	left := make(chan time.Duration, 1)
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{RangeFn: func(ctx context.Context, _ *pb.RangeRequest) (*pb.RangeResponse, error) {
		d, ok := ctx.Deadline()
		if !ok {
			return nil, errors.New("no deadline")
		}
		left <- time.Until(d)
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	conn := startProxy(t, etcd, nil, nil).dial(t)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("k")})
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
	if d := proxytest.Wait(t, left, "request"); d <= 0 || d > 300*time.Millisecond {
		t.Errorf("etcd had %v left", d)
	}
}

func TestHalfCloseKeepsTheWatch(t *testing.T) {
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
		for n := 0; ; n++ {
			if _, err := s.Recv(); errors.Is(err, io.EOF) {
				ev := func(typ mvccpb.Event_EventType, stored []byte) *mvccpb.Event {
					return &mvccpb.Event{Type: typ, Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: stored}}
				}
				del := ev(mvccpb.Event_DELETE, nil)
				del.PrevKv = &mvccpb.KeyValue{Key: []byte("k"), Value: proxytest.Sealed("k", "old")}
				return s.Send(&pb.WatchResponse{WatchId: int64(n), Events: []*mvccpb.Event{ev(mvccpb.Event_PUT, proxytest.Sealed("k", "new")), del}})
			} else if err != nil {
				return err
			}
		}
	}})
	conn := startProxy(t, etcd, everything, nil).dial(t)
	s, err := pb.NewWatchClient(conn).Watch(proxytest.TestContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Send(proxytest.CreateWatch("k", "")); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	r, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if r.WatchId != 2 || string(r.Events[0].Kv.Value) != "new" || string(r.Events[1].PrevKv.Value) != "old" || r.Events[1].Kv.Value != nil {
		t.Errorf("got %v", r)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
}

func TestWatchHeadersBeforeAnyMessage(t *testing.T) {
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
		if err := s.SendHeader(metadata.Pairs("early", "yes")); err != nil {
			return err
		}
		<-s.Context().Done()
		return nil
	}})
	conn := startProxy(t, etcd, everything, nil).dial(t)
	s, err := pb.NewWatchClient(conn).Watch(proxytest.TestContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if h, err := s.Header(); err != nil || len(h["early"]) != 1 {
		t.Errorf("header %v, %v", h, err)
	}
}

// TestEtcdsOwnUnavailable: clients tell etcd's errors by their texts.
func TestEtcdsOwnUnavailable(t *testing.T) {
	want := status.Error(codes.Unavailable, "etcdserver: leader changed")
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		PutFn:   func(context.Context, *pb.PutRequest) (*pb.PutResponse, error) { return nil, want },
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error { return want },
	})
	conn := startProxy(t, etcd, everything, nil).dial(t)
	_, err := pb.NewKVClient(conn).Put(proxytest.TestContext(t), &pb.PutRequest{Key: []byte("k")})
	proxytest.SameStatus(t, err, want)
	s, err := pb.NewWatchClient(conn).Watch(proxytest.TestContext(t))
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv()
	proxytest.SameStatus(t, err, want)
}

func TestLargeMessages(t *testing.T) {
	const size = 64 << 20
	big := bytes.Repeat([]byte{'x'}, size)
	stored := proxytest.Sealed("k", string(big))
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{RangeFn: func(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
		return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: r.Key, Value: stored}}}, nil
	}})
	for _, prefix := range []string{"k", "other"} {
		conn := startProxy(t, etcd, []etcdapi.Rule{{Prefix: prefix, Sealer: proxytest.Reverser{}}}, nil).dial(t)
		resp, err := pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")})
		if err != nil {
			t.Fatal(err)
		}
		want := stored
		if prefix == "k" {
			want = big
		}
		if !bytes.Equal(resp.Kvs[0].Value, want) {
			t.Errorf("rule %q: the value differs, %d bytes", prefix, len(resp.Kvs[0].Value))
		}
	}
}

func TestListOf100000(t *testing.T) {
	const n = 100_000
	list := &pb.RangeResponse{Count: n}
	for i := range n {
		k := fmt.Sprintf("/registry/secrets/ns/s%06d", i)
		list.Kvs = append(list.Kvs, &mvccpb.KeyValue{Key: []byte(k), Value: proxytest.Sealed(k, fmt.Sprint("value ", i)), ModRevision: int64(i)})
	}
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{RangeFn: func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) { return list, nil }})
	conn := startProxy(t, etcd, []etcdapi.Rule{{Prefix: "/registry/secrets/", Sealer: proxytest.Reverser{}}}, nil).dial(t)
	resp, err := pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("/registry/"), RangeEnd: []byte("/registry0")})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Kvs) != n || resp.Count != n {
		t.Fatalf("%d keys, count %d", len(resp.Kvs), resp.Count)
	}
	for i, kv := range resp.Kvs {
		if string(kv.Value) != fmt.Sprint("value ", i) || kv.ModRevision != int64(i) {
			t.Fatalf("key %d: %v", i, kv)
		}
	}
}

func TestRequestSizeIsEtcds(t *testing.T) {
	const limit = 10_000
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		PutFn: func(context.Context, *pb.PutRequest) (*pb.PutResponse, error) { return &pb.PutResponse{}, nil },
		TxnFn: func(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error) { return &pb.TxnResponse{}, nil },
	})
	conn := startProxy(t, etcd, everything, func(c *Config) { c.MaxRequestBytes = limit }).dial(t)
	kv := pb.NewKVClient(conn)
	put := func(n int) error {
		_, err := kv.Put(proxytest.TestContext(t), &pb.PutRequest{Key: []byte("k"), Value: make([]byte, n)})
		return err
	}
	if err := put(limit - 100); err != nil {
		t.Error(err)
	}
	tooLarge := status.Error(codes.InvalidArgument, "etcdserver: request is too large")
	proxytest.SameStatus(t, put(limit), tooLarge)
	err := put(limit + 512*1024)
	if st := status.Convert(err); st.Code() != codes.ResourceExhausted || !strings.HasPrefix(st.Message(), "grpc: received message larger than max (") {
		t.Errorf("got %v", err)
	}
	ops := func(op *pb.RequestOp) *pb.TxnRequest { return &pb.TxnRequest{Failure: []*pb.RequestOp{op}} }
	_, err = kv.Txn(proxytest.TestContext(t), ops(&pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k"), Value: make([]byte, limit)}}}))
	proxytest.SameStatus(t, err, tooLarge)
	// etcd does not measure what does not go through raft.
	_, err = kv.Txn(proxytest.TestContext(t), ops(&pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: make([]byte, limit)}}}))
	proxytest.SameStatus(t, err, nil)
}

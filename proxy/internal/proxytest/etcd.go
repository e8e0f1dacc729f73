package proxytest

import (
	"bytes"
	"context"
	"errors"
	"net"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

// Reverser is a Sealer that anyone can check by eye: what is stored is the value backwards, behind
// a mark and the key.
type Reverser struct {
	OpenErr, SealErr error
}

func (r Reverser) Seal(_ context.Context, dst, key, value []byte) ([]byte, error) {
	if r.SealErr != nil {
		return nil, r.SealErr
	}
	out := append(append(dst, "sealed:"...), key...)
	out = append(out, ':')
	back := bytes.Clone(value)
	slices.Reverse(back)
	return append(out, back...), nil
}

func (r Reverser) Open(_ context.Context, dst, key, stored []byte) ([]byte, error) {
	if r.OpenErr != nil {
		return nil, r.OpenErr
	}
	rest, ok := bytes.CutPrefix(stored, append(append([]byte("sealed:"), key...), ':'))
	if !ok {
		return nil, errors.New("not what Seal wrote")
	}
	out := append(dst, rest...)
	slices.Reverse(out[len(dst):])
	return out, nil
}

func (r Reverser) TrySeal(dst, key, value []byte) ([]byte, error) {
	return r.Seal(context.Background(), dst, key, value)
}

func (r Reverser) TryOpen(dst, key, stored []byte) ([]byte, error) {
	return r.Open(context.Background(), dst, key, stored)
}

// Sealed is what etcd holds for value.
func Sealed(key, value string) []byte {
	out, _ := Reverser{}.Seal(context.Background(), nil, []byte(key), []byte(value))
	return out
}

// FakeEtcd is an etcd whose answers the test writes. A nil function is a method that is not
// implemented.
type FakeEtcd struct {
	pb.UnimplementedKVServer
	pb.UnimplementedWatchServer
	pb.UnimplementedLeaseServer
	pb.UnimplementedMaintenanceServer
	RangeFn   func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error)
	StreamFn  func(*pb.RangeRequest, grpc.ServerStreamingServer[pb.RangeStreamResponse]) error
	PutFn     func(context.Context, *pb.PutRequest) (*pb.PutResponse, error)
	DeleteFn  func(context.Context, *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error)
	TxnFn     func(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error)
	WatchFn   func(grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error
	KeepAlive func(grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error
}

func (f *FakeEtcd) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if f.RangeFn == nil {
		return f.UnimplementedKVServer.Range(ctx, r)
	}
	return f.RangeFn(ctx, r)
}

func (f *FakeEtcd) RangeStream(r *pb.RangeRequest, s grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
	if f.StreamFn == nil {
		return f.UnimplementedKVServer.RangeStream(r, s)
	}
	return f.StreamFn(r, s)
}

func (f *FakeEtcd) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	if f.PutFn == nil {
		return f.UnimplementedKVServer.Put(ctx, r)
	}
	return f.PutFn(ctx, r)
}

func (f *FakeEtcd) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	if f.DeleteFn == nil {
		return f.UnimplementedKVServer.DeleteRange(ctx, r)
	}
	return f.DeleteFn(ctx, r)
}

func (f *FakeEtcd) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if f.TxnFn == nil {
		return f.UnimplementedKVServer.Txn(ctx, r)
	}
	return f.TxnFn(ctx, r)
}

func (f *FakeEtcd) Watch(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
	if f.WatchFn == nil {
		return f.UnimplementedWatchServer.Watch(s)
	}
	return f.WatchFn(s)
}

func (f *FakeEtcd) LeaseKeepAlive(s grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
	if f.KeepAlive == nil {
		return f.UnimplementedLeaseServer.LeaseKeepAlive(s)
	}
	return f.KeepAlive(s)
}

// ServeFake starts f on loopback and returns its address.
func ServeFake(t testing.TB, f *FakeEtcd, opts ...grpc.ServerOption) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ServeFakeOn(t, f, l, opts...)
	return l.Addr().String()
}

func ServeFakeOn(t testing.TB, f *FakeEtcd, l net.Listener, opts ...grpc.ServerOption) {
	t.Helper()
	s := grpc.NewServer(append([]grpc.ServerOption{grpc.MaxRecvMsgSize(1 << 30), grpc.MaxSendMsgSize(1 << 30), grpc.WaitForHandlers(true)}, opts...)...)
	pb.RegisterKVServer(s, f)
	pb.RegisterWatchServer(s, f)
	pb.RegisterLeaseServer(s, f)
	pb.RegisterMaintenanceServer(s, f)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() { s.Stop(); <-done })
}

package proxytest

import (
	"bytes"
	"context"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// slowKMS is a Sealer whose keys with "slow" in them wait for a KMS.
type slowKMS struct {
	Release chan struct{} // closed when the KMS answers
	Waiting chan string   // the keys of those who begin to wait
	Left    chan error    // why those went that waited in vain
}

func NewSlowKMS() *slowKMS {
	return &slowKMS{Release: make(chan struct{}), Waiting: make(chan string, 100), Left: make(chan error, 100)}
}

func (s *slowKMS) wait(ctx context.Context, key []byte) error {
	if !bytes.Contains(key, []byte("slow")) {
		return nil
	}
	select {
	case <-s.Release:
		return nil
	default:
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s.Waiting <- string(key)
	select {
	case <-s.Release:
		return nil
	case <-ctx.Done():
		s.Left <- context.Cause(ctx)
		return ctx.Err()
	}
}

func (s *slowKMS) Seal(ctx context.Context, dst, key, value []byte) ([]byte, error) {
	if err := s.wait(ctx, key); err != nil {
		return nil, err
	}
	return Reverser{}.Seal(ctx, dst, key, value)
}

func (s *slowKMS) Open(ctx context.Context, dst, key, stored []byte) ([]byte, error) {
	if err := s.wait(ctx, key); err != nil {
		return nil, err
	}
	return Reverser{}.Open(ctx, dst, key, stored)
}

func (s *slowKMS) TrySeal(dst, key, value []byte) ([]byte, error) {
	if !s.ready(key) {
		return nil, etcdwire.ErrWouldBlock
	}
	return s.Seal(context.Background(), dst, key, value)
}

func (s *slowKMS) TryOpen(dst, key, stored []byte) ([]byte, error) {
	if !s.ready(key) {
		return nil, etcdwire.ErrWouldBlock
	}
	return s.Open(context.Background(), dst, key, stored)
}

// ready finds the key in what reverser stores.
func (s *slowKMS) ready(stored []byte) bool {
	select {
	case <-s.Release:
		return true
	default:
		return !bytes.Contains(stored, []byte("slow"))
	}
}

// ServeStore starts an etcd that has every key: its value is "v" and the key. A put is answered
// with the value that came.
func ServeStore(t *testing.T, list ...string) string {
	kv := func(key string) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Key: []byte(key), Value: Sealed(key, "v"+key)}
	}
	return ServeFake(t, &FakeEtcd{
		RangeFn: func(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
			if len(r.RangeEnd) == 0 {
				return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{kv(string(r.Key))}}, nil
			}
			resp := &pb.RangeResponse{Count: int64(len(list))}
			for _, k := range list {
				resp.Kvs = append(resp.Kvs, kv(k))
			}
			return resp, nil
		},
		PutFn: func(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
			return &pb.PutResponse{PrevKv: &mvccpb.KeyValue{Key: r.Key, Value: r.Value}}, nil
		},
		StreamFn: func(r *pb.RangeRequest, s grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
			for _, k := range list {
				if err := s.Send(&pb.RangeStreamResponse{RangeResponse: &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{kv(k)}}}); err != nil {
					return err
				}
			}
			return nil
		},
		KeepAlive: func(s grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
			for {
				r, err := s.Recv()
				if err != nil {
					return nil
				}
				if err := s.Send(&pb.LeaseKeepAliveResponse{ID: r.ID, TTL: 1}); err != nil {
					return err
				}
			}
		},
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			for {
				r, err := s.Recv()
				if err != nil {
					return nil
				}
				key := string(r.GetCreateRequest().GetKey())
				if err := s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: kv(key)}}}); err != nil {
					return err
				}
			}
		},
	})
}

// Unhurried opens and seals nothing in haste, and everything for a caller that waits.
type Unhurried struct{}

func (Unhurried) Seal(ctx context.Context, dst, key, value []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return Reverser{}.Seal(ctx, dst, key, value)
}

func (Unhurried) Open(ctx context.Context, dst, key, stored []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return Reverser{}.Open(ctx, dst, key, stored)
}

func (Unhurried) TrySeal(_, _, _ []byte) ([]byte, error) { return nil, etcdwire.ErrWouldBlock }

func (Unhurried) TryOpen(_, _, _ []byte) ([]byte, error) { return nil, etcdwire.ErrWouldBlock }

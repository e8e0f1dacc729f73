package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

func TestSealingErrors(t *testing.T) {
	secret := "canary-value"
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		PutFn: func(context.Context, *pb.PutRequest) (*pb.PutResponse, error) { return &pb.PutResponse{}, nil },
		RangeFn: func(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
			return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: r.Key, Value: []byte(secret)}}}, nil
		},
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			if _, err := s.Recv(); err != nil {
				return err
			}
			if err := s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: []byte(secret)}}}}); err != nil {
				return err
			}
			<-s.Context().Done()
			return nil
		},
	})
	for _, tt := range []struct {
		err  error
		want error
	}{
		{&etcdapi.SealError{Code: codes.Unavailable, Text: "KMS ack is away"}, status.Error(codes.Unavailable, "etcd-kms-proxy: KMS ack is away")},
		{fmt.Errorf("open: %w", &etcdapi.SealError{Code: codes.DataLoss, Text: "key k is damaged"}), status.Error(codes.DataLoss, "etcd-kms-proxy: key k is damaged")},
		{errors.New("something inside"), status.Error(codes.Internal, "etcd-kms-proxy: a value could not be encrypted or decrypted")},
		{context.DeadlineExceeded, status.Error(codes.DeadlineExceeded, "etcd-kms-proxy: context deadline exceeded")},
	} {
		p := startProxy(t, etcd, []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{OpenErr: tt.err, SealErr: tt.err}}}, nil)
		conn := p.dial(t)
		_, err := pb.NewKVClient(conn).Put(proxytest.TestContext(t), &pb.PutRequest{Key: []byte("k"), Value: []byte(secret)})
		proxytest.SameStatus(t, err, tt.want)
		_, err = pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")})
		proxytest.SameStatus(t, err, tt.want)
		s, err := pb.NewWatchClient(conn).Watch(proxytest.TestContext(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(proxytest.CreateWatch("a", "z")); err != nil {
			t.Fatal(err)
		}
		_, err = s.Recv()
		proxytest.SameStatus(t, err, tt.want)
		// A key outside the rule is none of the KMS' business.
		if _, err := pb.NewKVClient(conn).Put(proxytest.TestContext(t), &pb.PutRequest{Key: []byte("other"), Value: []byte("v")}); err != nil {
			t.Error(err)
		}
		if strings.Contains(p.logs.String(), secret) {
			t.Error("a value is in the log")
		}
	}
}

func TestMalformedGoesNoFurther(t *testing.T) {
	watch := func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
		if _, err := s.Recv(); err == nil {
			t.Error("a malformed request reached etcd")
		}
		return s.Context().Err()
	}
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{WatchFn: watch}, grpc.ChainUnaryInterceptor(func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) {
		t.Error("a malformed request reached etcd")
		return nil, errors.New("no")
	}))
	conn := startProxy(t, etcd, everything, nil).dial(t)
	for _, m := range []string{"Range", "RangeStream", "Put", "DeleteRange", "Txn"} {
		_, err := proxytest.RawCall(proxytest.TestContext(t), conn, "/etcdserverpb.KV/"+m, []byte{0x0a, 0x7f, 'x'})
		if st := status.Convert(err); st.Code() != codes.InvalidArgument || !strings.HasPrefix(st.Message(), rpc.TextPrefix) {
			t.Errorf("%s: %v", m, err)
		}
	}
	for _, m := range []string{"/v3lockpb.Lock/Lock", "/v3electionpb.Election/Proclaim"} {
		if _, err := proxytest.RawCall(proxytest.TestContext(t), conn, m, []byte{0x0a, 0x7f, 'x'}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", m, err)
		}
	}
	if _, err := proxytest.RawCall(proxytest.TestContext(t), conn, "/etcdserverpb.Watch/Watch", []byte{0x0a, 0x7f, 'x'}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("Watch: %v", err)
	}
}

func TestMalformedAnswerIsNotTheClientsFault(t *testing.T) {
	conn := startProxy(t, proxytest.ServeRaw(t, []byte{0x12, 0x7f, 'x'}), everything, nil).dial(t)
	_, err := proxytest.RawCall(proxytest.TestContext(t), conn, "/etcdserverpb.KV/Range", []byte{0x0a, 0x01, 'k'})
	if st := status.Convert(err); st.Code() != codes.Internal || !strings.HasPrefix(st.Message(), rpc.TextPrefix+"etcd's answer: ") {
		t.Errorf("got %v", err)
	}
}

// TestUntouchedBytes sends bytes that no typed client would: what the proxy does not have to change
// stays byte for byte.
func TestUntouchedBytes(t *testing.T) {
	unknown, err := proto.Marshal(&pb.RangeResponse{Count: 5})
	if err != nil {
		t.Fatal(err)
	}
	unknown = append(unknown, 0xfa, 0x07, 0x03, 'a', 'b', 'c') // field 127
	conn := startProxy(t, proxytest.ServeRaw(t, unknown), []etcdapi.Rule{{Prefix: "s", Sealer: proxytest.Reverser{}}}, nil).dial(t)
	for _, m := range []string{"/etcdserverpb.KV/Range", "/etcdserverpb.KV/Compact", "/grpc.health.v1.Health/Check"} {
		got, err := proxytest.RawCall(proxytest.TestContext(t), conn, m, []byte{0x0a, 0x01, 'k'})
		if err != nil || !bytes.Equal(got, unknown) {
			t.Errorf("%s: %x, %v", m, got, err)
		}
	}
}

// TestRulesSwappedInFlight: an answer that comes after new rules is inspected even if its request
// met none.
func TestRulesSwappedInFlight(t *testing.T) {
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	watching := make(chan struct{}, 1)
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		RangeFn: func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
			arrived <- struct{}{}
			<-release
			return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: []byte("k"), Value: proxytest.Sealed("k", "v")}}}, nil
		},
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			if _, err := s.Recv(); err != nil {
				return err
			}
			watching <- struct{}{}
			<-release
			return s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: proxytest.Sealed("k", "v")}}}})
		},
	})
	p := startProxy(t, etcd, nil, nil)
	conn := p.dial(t)
	s, err := pb.NewWatchClient(conn).Watch(proxytest.TestContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(proxytest.CreateWatch("k", "")); err != nil {
		t.Fatal(err)
	}
	got := make(chan *pb.RangeResponse, 1)
	go func() {
		r, err := pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")})
		if err != nil {
			t.Error(err)
		}
		got <- r
	}()
	proxytest.Wait(t, arrived, "range")
	proxytest.Wait(t, watching, "watch")
	if err := p.SetRules(everything); err != nil {
		t.Fatal(err)
	}
	close(release)
	if r := proxytest.Wait(t, got, "answer"); string(r.GetKvs()[0].GetValue()) != "v" {
		t.Errorf("range: %v", r)
	}
	if r, err := s.Recv(); err != nil || string(r.Events[0].Kv.Value) != "v" {
		t.Errorf("watch: %v, %v", r, err)
	}
	if err := p.SetRules([]etcdapi.Rule{{Prefix: "a", Sealer: proxytest.Reverser{}}, {Prefix: "a", Sealer: proxytest.Reverser{}}}); err == nil {
		t.Error("two rules with one prefix were taken")
	}
}

// TestExhausted: what etcd lacks, it says itself, also where a value is compared here.
func TestExhausted(t *testing.T) {
	full := status.Error(codes.ResourceExhausted, "etcdserver: mvcc: database space exceeded")
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		RangeFn: func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
			return &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 1}}, nil
		},
		TxnFn: func(_ context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
			for _, op := range r.Success {
				if op.GetRequestPut() != nil {
					return nil, full
				}
			}
			answer := &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 1}, Succeeded: true}
			for range r.Success {
				answer.Responses = append(answer.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{}}})
			}
			return answer, nil
		},
	})
	kv := pb.NewKVClient(startProxy(t, etcd, everything, nil).dial(t))
	put := []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}}}}
	_, err := kv.Txn(proxytest.TestContext(t), &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte("k"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("x")}}}, Success: put, Failure: put,
	})
	proxytest.SameStatus(t, err, full)
}

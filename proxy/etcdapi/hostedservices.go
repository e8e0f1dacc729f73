package etcdapi

import (
	"context"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// hostedServices runs etcd's own Election and Lock services in the proxy, for keys under a rule:
// the services read, compare and write values, and etcd has only ciphertexts. Their requests go to
// the proxy's own handlers like those of any client, with the metadata of the call that they serve.
type hostedServices struct {
	client  *clientv3.Client
	unaries map[string]func(ctx context.Context, decode func(any) error) (any, error) // by path
	streams map[string]func(grpc.ServerStream) error
}

func newHostedServices(a *API, to *upstream.Cluster) *hostedServices {
	id := &listener.Identity{Listener: "election and lock services", Upstream: to}
	own := LocalConn{Api: a, Identity: func(context.Context) (*listener.Identity, error) { return id, nil }}
	// As etcd's server makes the client for its services, without retries.
	client := clientv3.NewCtxClient(context.Background(), clientv3.WithZapLogger(zap.NewNop()))
	client.KV = clientv3.NewKVFromKVClient(pb.NewKVClient(own), client)
	client.Lease = clientv3.NewLeaseFromLeaseClient(pb.NewLeaseClient(own), client, time.Second)
	client.Watcher = clientv3.NewWatchFromWatchClient(pb.NewWatchClient(own), client)
	c := &hostedServices{
		client:  client,
		unaries: make(map[string]func(context.Context, func(any) error) (any, error)),
		streams: make(map[string]func(grpc.ServerStream) error),
	}
	v3electionpb.RegisterElectionServer(c, v3election.NewElectionServer(client))
	v3lockpb.RegisterLockServer(c, v3lock.NewLockServer(client))
	return c
}

// RegisterService implements grpc.ServiceRegistrar.
func (c *hostedServices) RegisterService(desc *grpc.ServiceDesc, impl any) {
	path := func(name string) string { return "/" + desc.ServiceName + "/" + name }
	for _, m := range desc.Methods {
		c.unaries[path(m.MethodName)] = func(ctx context.Context, decode func(any) error) (any, error) {
			return m.Handler(impl, ctx, decode, nil)
		}
	}
	for _, s := range desc.Streams {
		c.streams[path(s.StreamName)] = func(ss grpc.ServerStream) error { return s.Handler(impl, ss) }
	}
}

// Close ends all calls.
func (c *hostedServices) Close() { _ = c.client.Close() } // it reports the end of its own context

// unary serves a unary call.
func (c *hostedServices) unary(ctx context.Context, m *Method, in *rpc.Message) (*rpc.Message, error) {
	out, err := c.unaries[m.Path](outgoing(ctx), in.Decode)
	if err != nil {
		if cause := ownCause(ctx); cause != nil {
			return nil, cause
		}
		return nil, err
	}
	return rpc.MessageOf(out)
}

// stream serves a stream with one request.
func (c *hostedServices) stream(ctx context.Context, m *Method, in *rpc.Message, ss grpc.ServerStream) error {
	err := c.streams[m.Path](&decodedStream{ServerStream: ss, ctx: outgoing(ctx), in: in, metrics: m.Metrics})
	if cause := ownCause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}

// outgoing sends a call's metadata, tokens among them, along with the requests that are made for
// it.
func outgoing(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	for k := range md {
		if k == ":authority" || k == "content-type" || k == "user-agent" || k == upstream.MarkHeader {
			delete(md, k)
		}
	}
	return metadata.NewOutgoingContext(ctx, md)
}

// decodedStream is a stream whose one request has arrived, and whose messages are protobuf's.
type decodedStream struct {
	grpc.ServerStream
	ctx     context.Context
	in      *rpc.Message
	metrics *metrics.Method
}

// Context implements grpc.ServerStream.
func (s *decodedStream) Context() context.Context { return s.ctx }

// RecvMsg implements grpc.ServerStream.
func (s *decodedStream) RecvMsg(m any) error { return s.in.Decode(m) }

// SendMsg implements grpc.ServerStream.
func (s *decodedStream) SendMsg(m any) error {
	out, err := rpc.MessageOf(m)
	if err != nil {
		return err
	}
	if err := s.ServerStream.SendMsg(out); err != nil {
		return err
	}
	s.metrics.Sent.Inc()
	return nil
}

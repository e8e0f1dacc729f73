package proxy

import (
	"context"
	"net"
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
)

// hosted are etcd's own Election and Lock services, run here: they read, compare and write values, and etcd has only ciphertexts. Their requests to etcd come back to the engine as those of any
// client do, with the metadata of the call that they serve.
type hosted struct {
	lane   // to the services
	server *grpc.Server
	client *clientv3.Client
	back   *grpc.ClientConn // to the engine
	queue  *connQueue
}

func newHosted(e engine, to *upstream) (*hosted, error) {
	h := &hosted{queue: newConnQueue()}
	var err error
	if h.back, err = loop(e, &Identity{Listener: "election and lock services", to: to}); err != nil {
		return nil, err
	}
	// As etcd's server makes the client for its services, without retries.
	h.client = clientv3.NewCtxClient(context.Background(), clientv3.WithZapLogger(zap.NewNop()))
	h.client.KV = clientv3.NewKVFromKVClient(pb.NewKVClient(h.back), h.client)
	h.client.Lease = clientv3.NewLeaseFromLeaseClient(pb.NewLeaseClient(h.back), h.client, time.Second)
	h.client.Watcher = clientv3.NewWatchFromWatchClient(pb.NewWatchClient(h.back), h.client)
	h.server = grpc.NewServer(
		grpc.Creds(identityCredentials{}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			return handler(onwards(ctx), req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			return handler(srv, onwardStream{ss})
		}),
		grpc.WaitForHandlers(true),
	)
	v3electionpb.RegisterElectionServer(h.server, v3election.NewElectionServer(h.client))
	v3lockpb.RegisterLockServer(h.server, v3lock.NewLockServer(h.client))
	h.conn, err = within(func(conn net.Conn) { h.queue.put(&clientConn{Conn: conn, id: &Identity{}, closed: func() {}}) })
	if err != nil {
		_ = h.back.Close() // nothing went over it
		return nil, err
	}
	return h, nil
}

// take returns the way to the services, on which no call waits for others.
func (h *hosted) take() *lane {
	h.calls.Add(1)
	return &h.lane
}

// run serves until stop.
func (h *hosted) run() { _ = h.server.Serve(h.queue) } // it ends by stop alone

// stop ends all calls.
func (h *hosted) stop() {
	h.server.Stop()
	_ = h.client.Close() // it reports the end of its own context
	_ = h.conn.Close()   // nothing is left to lose
	_ = h.back.Close()
}

// onwards sends a call's metadata, tokens among them, along with the requests that are made for it.
func onwards(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	for k := range md {
		if k == ":authority" || k == "content-type" || k == "user-agent" || k == meantForEtcd {
			delete(md, k)
		}
	}
	return metadata.NewOutgoingContext(ctx, md)
}

type onwardStream struct{ grpc.ServerStream }

// Context implements grpc.ServerStream.
func (s onwardStream) Context() context.Context { return onwards(s.ServerStream.Context()) }

package upstream

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"slices"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// MarkHeader is in the metadata of every request that a proxy or a command sends to etcd, which
// ignores it. A proxy refuses a request that has it: two proxies in a row would encrypt twice, and
// a command would take decrypted values for plaintext. Other clients of etcd do not send it, and
// cannot distinguish a proxy from etcd by it.
const MarkHeader = "etcd-kms-proxy-meant-for"

// MarkValue are the values of [MarkHeader].
var MarkValue = []string{"etcd"}

// ErrChained is the error for a request of another proxy or of a command.
var ErrChained = rpc.Error(codes.FailedPrecondition, "etcd.endpoints leads to a proxy: name etcd itself")

// IsChained reports whether err is the answer of a proxy, not of etcd, to a request of
// [NewClient]'s.
func IsChained(err error) bool {
	var st interface{ GRPCStatus() *status.Status }
	return errors.As(err, &st) && st.GRPCStatus().Message() == status.Convert(ErrChained).Message()
}

// forEtcd marks every request of a client connection.
func forEtcd() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(metadata.AppendToOutgoingContext(ctx, MarkHeader, MarkValue[0]), method, req, reply, cc, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, stream grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return stream(metadata.AppendToOutgoingContext(ctx, MarkHeader, MarkValue[0]), desc, cc, method, opts...)
		}),
	}
}

// A server that makes its own requests of what it is asked, as etcd's grpc-proxy does, drops the
// metadata. So a proxy and a command also read a key that no etcd holds, and a proxy that is asked
// for it says what it is.

// The key is proxyProbe and random text, which no cache on the way has the answer for. A server on
// the way may put something in front of keys.
const (
	proxyProbe  = "/etcd-kms-proxy/probe/"
	probeRandom = 26 // the length of [rand.Text]
)

// IsProbe reports whether a RangeRequest reads such a key.
func IsProbe(msg []byte) bool {
	if !bytes.Contains(msg, []byte(proxyProbe)) {
		return false
	}
	var r pb.RangeRequest
	if proto.Unmarshal(msg, &r) != nil || len(r.RangeEnd) > 0 || len(r.Key) < probeRandom {
		return false
	}
	return bytes.HasSuffix(r.Key[:len(r.Key)-probeRandom], []byte(proxyProbe))
}

// FindProxy asks at each endpoint of etcd whether a proxy answers there, also where something that
// drops metadata stands between. It returns the first endpoint with one, and "" if there is none.
// An endpoint that does not answer within a second counts as one without. It asks without a user: a
// proxy answers before it would need one.
func FindProxy(ctx context.Context, cfg Config, log *slog.Logger) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, ConnectWait)
	defer cancel()
	key := proxyProbe + rand.Text()
	found := make([]bool, len(cfg.Endpoints))
	var all sync.WaitGroup
	for i, endpoint := range cfg.Endpoints {
		one := Config{Endpoints: []string{endpoint}, TLS: cfg.TLS}
		client, err := NewClient(one, log)
		if err != nil {
			return "", err
		}
		all.Go(func() {
			defer client.Close() //nolint:errcheck // it reports the end of its own context
			// Every member answers a serializable read alone.
			_, err := client.Get(ctx, key, clientv3.WithSerializable(), clientv3.WithCountOnly())
			found[i] = IsChained(err)
		})
	}
	all.Wait()
	if i := slices.Index(found, true); i >= 0 {
		return cfg.Endpoints[i], nil
	}
	return "", nil
}

// OutgoingContext carries the client's metadata on to etcd, and says that etcd is who it is for.
// What belongs to the connection is dropped: gRPC writes its own; pseudo headers, content type,
// user agent and timeout are left out by grpc-go itself.
func OutgoingContext(ctx context.Context) context.Context {
	md, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		md = make(metadata.MD, 1)
	}
	for k := range md {
		switch k {
		case "grpc-accept-encoding", "grpc-encoding", "grpc-timeout", "grpc-status", "grpc-message", "grpc-status-details-bin",
			"te", "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "host", "accept-encoding":
			delete(md, k)
		}
	}
	md[MarkHeader] = MarkValue
	return metadata.NewOutgoingContext(ctx, md)
}

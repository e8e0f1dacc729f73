package upstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/experimental"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// Config says where etcd is.
type Config struct {
	// Endpoints are etcd's client URLs: http://, https://, unix:// or bare host:port, all with or
	// all without TLS.
	Endpoints []string
	// HTTPEndpoints are the URLs where etcd serves HTTP, one for each of Endpoints and in the same
	// order; http:// or https://. Empty: it does so at Endpoints.
	HTTPEndpoints []string
	// TLS is used for https:// and unixs://, and for unix:// and bare addresses when it is set. Nil
	// with https:// verifies against the system's CAs.
	TLS *TLS
	// Username is a user of etcd, for [NewClient] alone: clients of the proxy bring their own
	// tokens.
	Username string
	// Password is that user's, requested at each login. If etcd refuses a changed one, the last
	// that it took is tried again.
	Password func() string
}

// ConnectWait is how long a call may wait for a connection that is down before it fails: long
// enough for one round of reconnecting, so that neither a proxy started before etcd nor a restart
// of etcd fails a request that could have been served at once.
const ConnectWait = time.Second

// ConnectParams is how soon a connection to etcd is tried again.
var ConnectParams = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
	MinConnectTimeout: 3 * time.Second,
}

// Cluster is the connection to etcd: etcd's own resolver and balancer over all endpoints, without
// its retries.
type Cluster struct {
	client    *clientv3.Client
	conn      *grpc.ClientConn // of the first connection in the pool
	first     *PoolConn
	pool      pool
	dial      func(...grpc.DialOption) (*clientv3.Client, error) // makes one more
	Endpoints []string
	TLS       *Credentials // nil without TLS
	log       *slog.Logger
	metrics   *metrics.Metrics // may be nil
	HTTP      *HTTP

	Connected atomic.Bool
	mu        sync.Mutex
	ready     chan struct{} // closed while up
}

// New makes a cluster of the endpoints in cfg, to which it connects in [Cluster.Run]. m may be nil.
func New(cfg Config, log *slog.Logger, m *metrics.Metrics) (*Cluster, error) {
	creds, err := cfg.credentials(log)
	if err != nil {
		return nil, err
	}
	secure, _ := creds.(*Credentials)
	if name := secure.commonName(); name != "" && m != nil {
		log.Warn("the proxy's certificate for etcd has a common name: where etcd's authentication is on, clients without a token act as the user of that name",
			"commonName", name, "hint", "use a certificate without one")
	}
	u := &Cluster{Endpoints: cfg.Endpoints, TLS: secure, log: log, metrics: m, ready: make(chan struct{})}
	u.pool.limit.Store(math.MaxInt64)
	u.dial = func(more ...grpc.DialOption) (*clientv3.Client, error) {
		voters := &voters{endpoints: cfg.Endpoints}
		client, err := clientv3.New(clientv3.Config{
			Endpoints:            cfg.Endpoints,
			Logger:               zap.NewNop(),
			DialKeepAliveTime:    15 * time.Second,
			DialKeepAliveTimeout: 10 * time.Second,
			DialOptions:          slices.Concat(dialOptions(settingsCredentials{creds, u.pool.lowerLimit}), voters.options(), more),
		})
		if err == nil {
			voters.client.Store(client)
		}
		return client, err
	}
	if u.client, err = u.dial(); err != nil {
		return nil, fmt.Errorf("etcd client: %w", err)
	}
	u.conn = u.client.ActiveConnection()
	u.first = &PoolConn{Conn: u.conn}
	if u.HTTP, err = newHTTP(cfg, u); err != nil {
		_ = u.client.Close() // it is not in use
		return nil, err
	}
	return u, nil
}

// dialOptions are those of every connection.
func dialOptions(creds credentials.TransportCredentials) []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(), // HTTPS_PROXY is for the cloud's services: no forward proxy stands before etcd
		// The client library's interceptors retry; a call through the proxy is the caller's to
		// retry.
		grpc.WithUnaryInterceptor(nil),
		grpc.WithStreamInterceptor(nil),
		grpc.WithDisableRetry(),
		experimental.WithBufferPool(rpc.Buffers),
		grpc.WithReadBufferSize(rpc.IOBufferSize),
		grpc.WithWriteBufferSize(rpc.IOBufferSize),
		grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(ConnectParams),
		grpc.WithDefaultCallOptions(
			grpc.ForceCodecV2(rpc.Codec{}),
			grpc.MaxCallRecvMsgSize(math.MaxInt32),
			grpc.MaxCallSendMsgSize(math.MaxInt32),
		),
	}
}

// credentials are how the endpoints are reached.
func (c Config) credentials(log *slog.Logger) (credentials.TransportCredentials, error) {
	secure, err := wantsTLS(c)
	if err != nil || !secure {
		return insecure.NewCredentials(), err
	}
	return c.TLS.credentials(log)
}

// clientRecvBytes bounds an answer to a client of [NewClient]: who asks for more is told so, and
// can ask for less.
const clientRecvBytes = 64 << 20

// NewClient connects etcd's own client library to the same endpoints, with the same TLS, for calls
// that are not a client's: what is stored passes as it is, and a proxy refuses it, see
// [IsChained]. It retries what can be repeated. Answers of more than 64 MiB are ResourceExhausted.
// It does not wait for etcd; the caller closes it.
func NewClient(cfg Config, log *slog.Logger) (*clientv3.Client, error) {
	creds, err := cfg.credentials(log)
	if err != nil {
		return nil, err
	}
	auth, voters := &lateAuth{log: log}, &voters{endpoints: cfg.Endpoints}
	var password string // that of the first login, which the library keeps
	if cfg.Username != "" {
		auth.password, password = cfg.Password, cfg.Password()
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: cfg.Endpoints, Logger: zap.NewNop(), Username: cfg.Username, Password: password,
		DialKeepAliveTime: 15 * time.Second, DialKeepAliveTimeout: 10 * time.Second,
		MaxCallRecvMsgSize: clientRecvBytes, MaxCallSendMsgSize: clientRecvBytes / 2,
		DialOptions: append(slices.Concat(forEtcd(), voters.options(), auth.options()),
			grpc.WithTransportCredentials(creds), grpc.WithNoProxy(), grpc.WithConnectParams(ConnectParams)),
	})
	if err != nil {
		return nil, fmt.Errorf("etcd client: %w", err)
	}
	auth.made.Store(true)
	voters.client.Store(client)
	return client, nil
}

// WhyUnreachable says why a client of [NewClient] has no connection to etcd, or "" where it has
// one. The client's own calls wait for one until their time is over, and say that alone.
func WhyUnreachable(ctx context.Context, client *clientv3.Client) string {
	ctx, cancel := context.WithTimeout(ctx, ConnectWait)
	defer cancel()
	_, err := healthpb.NewHealthClient(client.ActiveConnection()).Check(ctx, &healthpb.HealthCheckRequest{})
	if status.Code(err) != codes.Unavailable {
		return ""
	}
	return status.Convert(err).Message()
}

// wantsTLS says whether the endpoints are reached with TLS. One connection pool has one kind of
// security, so a mixture is an error.
func wantsTLS(cfg Config) (bool, error) {
	if len(cfg.Endpoints) == 0 {
		return false, errors.New("etcd endpoints: there is none")
	}
	secure := 0
	for _, e := range cfg.Endpoints {
		switch scheme, _, found := strings.Cut(e, ":"); {
		case scheme == "https" || scheme == "unixs":
			secure++
		case found && scheme == "http":
		case cfg.TLS != nil:
			secure++
		}
	}
	if secure != 0 && secure != len(cfg.Endpoints) {
		return false, errors.New("etcd endpoints: some with TLS and some without")
	}
	return secure > 0, nil
}

// Run watches the connection until ctx ends, keeps it up, and says in the log when etcd goes and
// comes back.
func (u *Cluster) Run(ctx context.Context) {
	logged := false // that etcd is unreachable
	for {
		state := u.conn.GetState()
		u.setConnected(state == connectivity.Ready)
		switch state {
		case connectivity.Idle:
			u.conn.Connect()
		case connectivity.Ready:
			if logged {
				u.log.Info("etcd is reachable again", "endpoints", u.Endpoints)
			}
			logged = false
		case connectivity.TransientFailure:
			if !logged {
				u.log.Warn("etcd is unreachable; the proxy keeps trying", "endpoints", u.Endpoints, "error", status.Convert(u.checkHealth(ctx)).Message())
			}
			logged = true
		}
		if !u.conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// checkHealth asks etcd for its health. The error says why no connection can be made, or that it is
// a learner.
func (u *Cluster) checkHealth(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, ConnectWait)
	defer cancel()
	out := new(rpc.Message)
	defer out.Free()
	return u.conn.Invoke(ctx, healthpb.Health_Check_FullMethodName, new(rpc.Message), out)
}

func (u *Cluster) setConnected(up bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.Connected.Load() == up {
		return
	}
	u.Connected.Store(up)
	gauge := 0.0
	if up {
		close(u.ready)
		gauge = 1
	} else {
		u.ready = make(chan struct{})
	}
	if u.metrics != nil {
		u.metrics.UpstreamUp.Set(gauge)
	}
}

// WaitConnected returns once etcd is connected, ctx ends or readyWait is over, whichever is first.
// The call then goes ahead and learns for itself.
func (u *Cluster) WaitConnected(ctx context.Context) {
	if u.Connected.Load() {
		return
	}
	u.mu.Lock()
	ready := u.ready
	u.mu.Unlock()
	timer := time.NewTimer(ConnectWait)
	defer timer.Stop()
	select {
	case <-ready:
	case <-ctx.Done():
	case <-timer.C:
	}
}

// Close closes all connections.
func (u *Cluster) Close() {
	u.HTTP.CloseIdleConnections()
	u.pool.Close()
	// The client reports the end of its own context, which close brought about.
	_ = u.client.Close()
}

package gateway

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/etcdserverpb/gw"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	electiongw "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb/gw"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	lockgw "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb/gw"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// Gateway serves HTTP on the addresses of gRPC, as etcd does (HTTP/2 only over TLS). It serves the
// JSON gateway under /v3/ with the handlers that etcd generates, and forwards requests of etcd's
// health and version to etcd. A JSON request becomes a call of etcd's API by the client of the
// connection.
type Gateway struct {
	server  *http.Server
	Handler http.Handler // of HTTP/2, too
	sockets *websockets
	conns   *connQueue

	draining atomic.Bool
}

const (
	// headerTimeout is how long a client may take to send the headers of a request, and idleTimeout
	// how long it may be silent between two.
	headerTimeout = time.Minute
	idleTimeout   = 5 * time.Minute
	// lateRequest is how long a connection that has no request is kept during a drain. A client
	// that uses it all the time then learns from a response that the connection closes. If the
	// proxy closed it at once, a request might be on the way, and no client can tell whether that
	// was served.
	lateRequest = 250 * time.Millisecond
)

// New makes the gateway to an API.
func New(a *etcdapi.API) (*Gateway, error) {
	g := &Gateway{conns: newConnQueue()}
	api, err := newJSON(a)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	// In JSON, bytes are a third longer; what is too long then is refused as gRPC refuses it.
	limit := 2 * int64(a.Core.MaxRequest+etcdapi.GrpcOverhead)
	budget := newBodyBudget(limit)
	g.sockets = newWebsockets(takeTurns(api), budget)
	mux.Handle("/v3/", http.MaxBytesHandler(budget.limit(g.sockets), limit))
	etcd := etcdProxy()
	for _, path := range []string{"/health", "/livez", "/livez/", "/readyz", "/readyz/", "/version", "/metrics"} {
		mux.Handle(path, etcd)
	}
	g.Handler = acceptBeta(guardOrigin(authorize(a, mux)))
	g.server = &http.Server{
		Handler: g.closing(g.Handler), ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: http2conn.MaxHeaderListSize,
		ErrorLog:       log.New(io.Discard, "", 0), // it reports what clients do wrong
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			c, _ := conn.(*listener.Conn)
			return listener.WithIdentity(ctx, c.Identity)
		},
		ConnState: g.conns.state,
		Protocols: new(http.Protocols),
	}
	g.server.Protocols.SetHTTP1(true)
	return g, nil
}

// newJSON makes etcd's gateway to the API, with etcd's options for JSON.
func newJSON(a *etcdapi.API) (http.Handler, error) {
	mux := runtime.NewServeMux(runtime.WithMarshalerOption(runtime.MIMEWildcard, &runtime.HTTPBodyMarshaler{
		Marshaler: &runtime.JSONPb{
			MarshalOptions:   protojson.MarshalOptions{UseProtoNames: true},
			UnmarshalOptions: protojson.UnmarshalOptions{DiscardUnknown: true},
		},
	}))
	ctx := context.Background()
	conn := etcdapi.LocalConn{Api: a, Identity: func(ctx context.Context) (*listener.Identity, error) {
		if id := listener.IdentityOf(ctx); id != nil {
			return id, nil
		}
		return nil, etcdapi.ErrNoIdentity
	}}
	err := errors.Join(
		gw.RegisterKVHandlerClient(ctx, mux, pb.NewKVClient(conn)),
		gw.RegisterWatchHandlerClient(ctx, mux, pb.NewWatchClient(conn)),
		gw.RegisterLeaseHandlerClient(ctx, mux, pb.NewLeaseClient(conn)),
		gw.RegisterClusterHandlerClient(ctx, mux, pb.NewClusterClient(conn)),
		gw.RegisterMaintenanceHandlerClient(ctx, mux, pb.NewMaintenanceClient(conn)),
		gw.RegisterAuthHandlerClient(ctx, mux, pb.NewAuthClient(conn)),
		lockgw.RegisterLockHandlerClient(ctx, mux, v3lockpb.NewLockClient(conn)),
		electiongw.RegisterElectionHandlerClient(ctx, mux, v3electionpb.NewElectionClient(conn)),
	)
	return mux, err
}

// takeTurns has the decoder of a long body let other goroutines run every now and then. It would
// otherwise compute until the runtime preempts it, and the clients of all other connections would
// wait for each of many such bodies.
func takeTurns(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Body != nil && r.Body != http.NoBody {
			turns := *r
			turns.Body = &turnsBody{ReadCloser: r.Body}
			r = &turns
		}
		next.ServeHTTP(w, r)
	})
}

// bodyTurn is how many bytes of a body are decoded in one turn.
const bodyTurn = 16 << 10

// turnsBody is a body that is read in turns.
type turnsBody struct {
	io.ReadCloser
	read int // in this turn
}

// Read implements io.Reader.
func (b *turnsBody) Read(p []byte) (int, error) {
	if b.read >= bodyTurn {
		b.read = 0
		goruntime.Gosched()
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), bodyTurn-b.read)])
	b.read += n
	return n, err
}

// acceptBeta serves /v3beta/, which clients of etcd 3.3 and earlier request, as /v3/. So does etcd.
func acceptBeta(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if rest, ok := strings.CutPrefix(r.URL.Path, "/v3beta/"); ok {
			request, url := *r, *r.URL
			url.Path, request.URL = "/v3/"+rest, &url
			r = &request
		}
		next.ServeHTTP(w, r)
	})
}

// authorize refuses clients that the listener denies, before anything of the body is read.
func authorize(a *etcdapi.API, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := listener.IdentityOf(r.Context())
		switch {
		case id == nil:
			http.Error(w, "client is not allowed here", http.StatusForbidden)
		case !id.Denied:
			next.ServeHTTP(w, r)
		default:
			err := status.Convert(a.Deny(id))
			if !isGateway(r.URL.Path) || websocket.IsWebSocketUpgrade(r) {
				http.Error(w, "client is not allowed here", http.StatusForbidden)
				return
			}
			writeStatus(w, http.StatusForbidden, err.Code(), err.Message())
		}
	})
}

// closing has responses close their connections during a drain.
func (g *Gateway) closing(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g.draining.Load() {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}

// Serve takes over conn and returns once a shutdown would wait for it.
func (g *Gateway) Serve(conn *listener.Conn) { g.conns.put(conn) }

// Run serves until ctx ends, and lets requests finish for as long as the engine does.
func (g *Gateway) Run(ctx context.Context, drainTimeout time.Duration) {
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = g.server.Serve(g.conns) // it ends by Shutdown alone
	}()
	<-ctx.Done()
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	var sockets sync.WaitGroup
	sockets.Go(func() { g.sockets.Close(limited) })
	// Shutdown comes last: it drops a request that has just arrived.
	g.draining.Store(true)
	defer time.AfterFunc(lateRequest, func() { g.server.SetKeepAlivesEnabled(false) }).Stop()
	g.conns.drain(limited)
	_ = g.server.Close()
	sockets.Wait()
	<-served
}

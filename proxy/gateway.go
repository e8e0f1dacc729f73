package proxy

import (
	"context"
	"errors"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/etcdserverpb/gw"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	electiongw "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb/gw"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	lockgw "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb/gw"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
)

// gateway serves HTTP on the addresses of gRPC, as etcd does, HTTP/2 over TLS alone: its JSON gateway under /v3/, by the handlers that etcd generates, and what etcd itself says of its health and version.
// A request of the gateway comes back to the engine as one of gRPC, in the name of the connection that it came over.
type gateway struct {
	engine  engine
	server  *http.Server
	sockets *websockets
	conns   *connQueue
}

const (
	// headerTimeout is how long a client may take to send the headers of a request, and idleTimeout how long it may be silent between two.
	headerTimeout = time.Minute
	idleTimeout   = 5 * time.Minute
)

// looped is an HTTP connection with its way to the engine.
type looped struct {
	net.Conn
	engine engine
	id     *Identity

	once sync.Once
	conn *grpc.ClientConn
	err  error
}

type loopedKey struct{}

// Close closes both.
func (c *looped) Close() error {
	c.once.Do(func() { c.err = net.ErrClosed })
	if c.conn != nil {
		_ = c.conn.Close() // what was asked for over it has ended
	}
	return c.Conn.Close()
}

func newGateway(e engine, maxRequest int) (*gateway, error) {
	g := &gateway{engine: e, conns: newConnQueue()}
	api, err := newAPI()
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	// In JSON, bytes are a third longer; what is too long then is refused as gRPC refuses it.
	limit := 2 * int64(maxRequest+grpcOverhead)
	g.sockets = newWebsockets(api, limit)
	mux.Handle("/v3/", http.MaxBytesHandler(g.sockets, limit))
	own := etcdItself()
	for _, path := range []string{"/health", "/livez", "/livez/", "/readyz", "/readyz/", "/version", "/metrics"} {
		mux.Handle(path, own)
	}
	g.server = &http.Server{
		Handler: readOut(ofBeta(guardOrigin(admitted(mux)))), ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		ErrorLog: log.New(io.Discard, "", 0), // it tells of what clients do wrong
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, loopedKey{}, conn)
		},
		// HTTP/2 comes from the frame engine, within the process; as many streams as the client has.
		Protocols: new(http.Protocols), HTTP2: &http.HTTP2Config{MaxConcurrentStreams: math.MaxInt32},
	}
	g.server.Protocols.SetHTTP1(true)
	g.server.Protocols.SetUnencryptedHTTP2(true)
	return g, nil
}

// newAPI makes etcd's gateway, with etcd's options for JSON.
func newAPI() (http.Handler, error) {
	mux := runtime.NewServeMux(runtime.WithMarshalerOption(runtime.MIMEWildcard, &runtime.HTTPBodyMarshaler{
		Marshaler: &runtime.JSONPb{
			MarshalOptions:   protojson.MarshalOptions{UseProtoNames: true},
			UnmarshalOptions: protojson.UnmarshalOptions{DiscardUnknown: true},
		},
	}))
	ctx, way := context.Background(), ofRequest{}
	err := errors.Join(
		gw.RegisterKVHandlerClient(ctx, mux, pb.NewKVClient(way)),
		gw.RegisterWatchHandlerClient(ctx, mux, pb.NewWatchClient(way)),
		gw.RegisterLeaseHandlerClient(ctx, mux, pb.NewLeaseClient(way)),
		gw.RegisterClusterHandlerClient(ctx, mux, pb.NewClusterClient(way)),
		gw.RegisterMaintenanceHandlerClient(ctx, mux, pb.NewMaintenanceClient(way)),
		gw.RegisterAuthHandlerClient(ctx, mux, pb.NewAuthClient(way)),
		lockgw.RegisterLockHandlerClient(ctx, mux, v3lockpb.NewLockClient(way)),
		electiongw.RegisterElectionHandlerClient(ctx, mux, v3electionpb.NewElectionClient(way)),
	)
	return mux, err
}

// ofRequest goes the way of the HTTP connection that a request came over.
type ofRequest struct{}

var errNotLooped = errors.New("the request came over no connection of the gateway")

func (ofRequest) conn(ctx context.Context) (*grpc.ClientConn, error) {
	c, ok := ctx.Value(loopedKey{}).(*looped)
	if !ok {
		return nil, errNotLooped
	}
	c.once.Do(func() { c.conn, c.err = loop(c.engine, c.id) })
	return c.conn, c.err
}

// Invoke implements grpc.ClientConnInterface.
func (o ofRequest) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	conn, err := o.conn(ctx)
	if err != nil {
		return err
	}
	return conn.Invoke(ctx, method, args, reply, opts...)
}

// NewStream implements grpc.ClientConnInterface.
func (o ofRequest) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	conn, err := o.conn(ctx)
	if err != nil {
		return nil, err
	}
	return conn.NewStream(ctx, desc, method, opts...)
}

// What a client still sends after the response is read up to these, so that it is not reset in the midst of it: some report an error then, and not the response. For HTTP/1.1 net/http does
// the same.
const (
	lateBody = 256 << 10 // bytes
	lateWait = 500 * time.Millisecond
)

// readOut reads what next left of the body of a request over HTTP/2.
func readOut(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r)
		if r.ProtoMajor == 2 && r.ContentLength != 0 && http.NewResponseController(w).SetReadDeadline(time.Now().Add(lateWait)) == nil {
			_, _ = io.CopyN(io.Discard, r.Body, lateBody) // whatever comes
		}
	})
}

// ofBeta takes /v3beta/, the name of before etcd 3.4 that clients still ask for, for /v3/, as etcd does.
func ofBeta(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if rest, ok := strings.CutPrefix(r.URL.Path, "/v3beta/"); ok {
			named, asked := *r.URL, *r
			named.Path, asked.URL = "/v3/"+rest, &named
			r = &asked
		}
		next.ServeHTTP(w, r)
	})
}

// admitted lets nobody in whom the listener denies.
func admitted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := r.Context().Value(loopedKey{}).(*looped)
		said := isGateway(r.URL.Path) && !websocket.IsWebSocketUpgrade(r) // by the engine, with a code
		if !ok || c.id.Denied && !said {
			http.Error(w, "client is not allowed here", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// serve takes over conn and returns at once.
func (g *gateway) serve(conn *clientConn) { g.conns.put(conn) }

// Accept implements net.Listener.
func (g *gateway) Accept() (net.Conn, error) {
	conn, err := g.conns.Accept()
	if err != nil {
		return nil, err
	}
	c, _ := conn.(*clientConn)
	return &looped{Conn: c, engine: g.engine, id: c.id}, nil
}

// Close implements net.Listener.
func (g *gateway) Close() error { return g.conns.Close() }

// Addr implements net.Listener.
func (g *gateway) Addr() net.Addr { return g.conns.Addr() }

// run serves until ctx ends, and lets requests finish for as long as the engine does.
func (g *gateway) run(ctx context.Context, drainTimeout time.Duration) {
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = g.server.Serve(g) // it ends by Shutdown alone
	}()
	<-ctx.Done()
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	var sockets sync.WaitGroup
	sockets.Go(func() { g.sockets.close(limited) })
	if g.server.Shutdown(limited) != nil {
		_ = g.server.Close() // what is left is cut
	}
	sockets.Wait()
	<-served
}

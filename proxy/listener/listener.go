package listener

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/unixsocket"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// Config is one address that clients connect to.
type Config struct {
	// Address is host:port, or unix:// and an absolute path. With Sockets it is only a name.
	Address string
	// Sockets are bound already, by a service manager for example, and are served in place of
	// Address. The proxy closes them; their files stay. All have the same clients and the same
	// policy.
	Sockets []net.Listener
	// Mode is the socket's file mode; 0 means 0600.
	Mode fs.FileMode
	// TLS is nil for cleartext.
	TLS *TLS
	// AllowedClients are the common names and subject alternative names that may enter; empty: any
	// certificate of the CA. What others ask for is answered with PermissionDenied.
	AllowedClients []string
	// CiphertextClients are given the bytes that etcd stores, and may only read. They need not be
	// in AllowedClients.
	CiphertextClients []string
	// AdvertiseClientURLs are put in place of the members' client URLs: those of a member that a
	// listener leads to are that listener's. Empty: they pass as they are.
	AdvertiseClientURLs []string
	// Endpoint is the only one of UpstreamConfig.Endpoints that the listener leads to; empty: to
	// all.
	Endpoint string
	// NoGateway turns the JSON gateway off: paths under /v3/ are 404.
	NoGateway bool
}

// HandshakeTimeout bounds how long a client may take to identify itself.
const HandshakeTimeout = 10 * time.Second

// LateHandshake is how long a client may still take when its listener is about to close: enough for
// one that does connect, so that its first calls are not lost.
const LateHandshake = time.Second

// Listener accepts connections, finds out who is there and hands them on.
type Listener struct {
	Config     Config
	sockets    []net.Listener  // at least one
	TLS        *tlsfiles.Files // nil for cleartext
	lists      atomic.Pointer[clientLists]
	conns      connSet
	Upstream   *upstream.Cluster
	hostPolicy *HostPolicy
	log        *slog.Logger
	metrics    *metrics.Metrics

	rejected       atomic.Int64 // connections, since the last one that was logged
	rejectedLogged rate.Sometimes
}

// Conn is a connection that has been identified.
type Conn struct {
	net.Conn
	WriteBuffer *writebuffer.Buffer // what Conn writes to; nil within the process
	Plaintext   bool                // and not over TLS
	Identity    *Identity
	HTTP1       bool // and not HTTP/2
	once        sync.Once
	OnClose     func()

	certs   []*x509.Certificate // the client's, its own first; nil without
	expires time.Time           // when they cease to be valid
}

// Close closes the connection. It may be called more than once.
func (c *Conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.OnClose)
	return err
}

// Listen checks cfg and binds its address.
func Listen(cfg Config, log *slog.Logger, m *metrics.Metrics) (*Listener, error) {
	l := &Listener{Config: cfg, log: log, metrics: m, rejectedLogged: rate.Sometimes{Interval: time.Second}}
	l.lists.Store(newClientLists(cfg.AllowedClients, cfg.CiphertextClients))
	err := cfg.checkLists(cfg.AllowedClients, cfg.CiphertextClients)
	if err != nil {
		return nil, err
	}
	if cfg.TLS != nil {
		if l.TLS, err = cfg.TLS.serverTLS(log, cfg.Address); err != nil {
			return nil, fmt.Errorf("listener %s: %w", cfg.Address, err)
		}
	}
	l.hostPolicy = newHostPolicy(cfg, l.TLS)
	m.ExpectListener(cfg.Address, cfg.TLS != nil && cfg.TLS.ClientCAFile != "")
	if l.sockets = cfg.Sockets; len(l.sockets) > 0 {
		return l, nil
	}
	var socket net.Listener
	if path, ok := strings.CutPrefix(cfg.Address, "unix://"); ok {
		socket, err = unixsocket.Listen(path, cmp.Or(cfg.Mode, 0o600))
	} else {
		socket, err = net.Listen("tcp", cfg.Address)
	}
	if err != nil {
		return nil, fmt.Errorf("listener %s: %w", cfg.Address, err)
	}
	l.sockets = []net.Listener{socket}
	return l, nil
}

func set(names []string) map[string]bool {
	m := make(map[string]bool, len(names))
	for _, n := range names {
		m[n] = true
	}
	return m
}

// ErrNoFolder says that what should hold a unix socket is not there.
var ErrNoFolder = unixsocket.ErrNoFolder

// Addr is the address of the first socket.
func (l *Listener) Addr() net.Addr { return l.sockets[0].Addr() }

// Close closes all sockets.
func (l *Listener) Close() error {
	var err error
	for _, socket := range l.sockets {
		err = errors.Join(err, socket.Close())
	}
	return err
}

// Run accepts until the listener is closed, and returns once every connection is handed on or gone.
// Connections that have not identified themselves by [LateHandshake] after the end of ctx are
// closed.
func (l *Listener) Run(ctx context.Context, serve func(*Conn)) {
	identifying, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(LateHandshake, cancel) })()
	var accepting, handshakes sync.WaitGroup
	defer handshakes.Wait()
	for _, socket := range l.sockets {
		accepting.Go(func() {
			l.accept(ctx, socket, func(conn net.Conn) {
				handshakes.Go(func() {
					if c, err := l.identify(identifying, conn); err != nil {
						_ = conn.Close()
						if !errors.Is(err, errNothingSent) && ctx.Err() == nil {
							l.handshakeFailed(conn, err)
						}
					} else {
						serve(c)
					}
				})
			})
		})
	}
	accepting.Wait()
}

// accept calls accepted with each connection of a socket, until that is closed.
func (l *Listener) accept(ctx context.Context, socket net.Listener, accepted func(net.Conn)) {
	pause := time.Duration(0)
	for {
		conn, err := socket.Accept()
		if err == nil {
			pause = 0
			accepted(conn)
			continue
		}
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		// The process may be out of file descriptors: others will be closed.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		l.log.Error("connections cannot be accepted", "listener", l.Config.Address, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// errNothingSent is of a connection that ended before its client sent a byte, or the first byte
// behind a TLS handshake: a TCP health check or a port scan. It is neither counted nor logged,
// since nothing was tried.
var errNothingSent = errors.New("the client sent nothing")

// readConn is a connection that remembers whether anything was read from it.
type readConn struct {
	net.Conn
	hasRead bool
}

// Read implements net.Conn.
func (c *readConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.hasRead = c.hasRead || n > 0
	return n, err
}

// identify does the TLS handshake, if any, says who is there, and finds out what they speak.
func (l *Listener) identify(ctx context.Context, conn net.Conn) (*Conn, error) {
	id := &Identity{Listener: l.Config.Address, Remote: conn.RemoteAddr().String(), Upstream: l.Upstream, AdvertiseClientURLs: l.Config.AdvertiseClientURLs, HostPolicy: l.hostPolicy}
	buffer, protocol := writebuffer.New(conn), ""
	conn = buffer
	c := &Conn{WriteBuffer: buffer, Plaintext: l.TLS == nil, Identity: id}
	by := l.criteria()
	if l.TLS != nil {
		limited, cancel := context.WithTimeout(ctx, HandshakeTimeout)
		defer cancel()
		client := &readConn{Conn: conn}
		secure := tls.Server(client, by.files)
		if err := secure.HandshakeContext(limited); err != nil {
			if !client.hasRead {
				err = errors.Join(errNothingSent, err)
			}
			return nil, err
		}
		state := secure.ConnectionState()
		if certs := state.PeerCertificates; len(certs) > 0 {
			id.identify(certs[0])
			c.certs, c.expires = certs, validUntil(state.VerifiedChains)
		}
		conn, protocol = secure, state.NegotiatedProtocol
	}
	id.authorise(by.lists)
	c.HTTP1 = protocol == tlsfiles.ProtocolHTTP1
	if protocol == "" {
		var err error
		if conn, c.HTTP1, err = detectProtocol(ctx, conn); err != nil {
			return nil, err
		}
	}
	c.Conn = conn
	if err := l.admit(c, by); err != nil {
		return nil, err
	}
	connections := l.metrics.Connections.WithLabelValues(l.Config.Address)
	connections.Inc()
	c.OnClose = func() {
		l.forget(c)
		connections.Dec()
	}
	return c, nil
}

// handshakeFailed logs at most once a second, or a port scan would fill the log.
func (l *Listener) handshakeFailed(conn net.Conn, err error) {
	l.metrics.HandshakeFailures.WithLabelValues(l.Config.Address).Inc()
	l.rejected.Add(1)
	l.rejectedLogged.Do(func() {
		l.log.Warn("connection rejected", "listener", l.Config.Address, "remote", conn.RemoteAddr().String(), "error", err, "notLoggedBefore", l.rejected.Swap(0)-1)
	})
}

package proxy

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/h2"
)

// ListenerConfig is one address that clients connect to.
type ListenerConfig struct {
	// Address is host:port, or unix:// and an absolute path. With Sockets it is only a name.
	Address string
	// Sockets are bound already, by a service manager for example, and are served in place of Address. The proxy closes them; their files
	// stay. All have the same clients and the same policy.
	Sockets []net.Listener
	// Mode is the socket's file mode; 0 means 0600.
	Mode fs.FileMode
	// TLS is nil for cleartext.
	TLS *ListenerTLS
	// AllowedClients are the common names and subject alternative names that may enter; empty: any certificate of the CA. What others
	// ask for is answered with PermissionDenied.
	AllowedClients []string
	// CiphertextClients are given the bytes that etcd stores, and may not write keys under a rule. They need not be in AllowedClients.
	CiphertextClients []string
	// AdvertiseClientURLs are put in place of the members' client URLs: those of a member that a listener leads to are that listener's. Empty: they pass as they are.
	AdvertiseClientURLs []string
	// Endpoint is the only one of UpstreamConfig.Endpoints that the listener leads to; empty: to all.
	Endpoint string
}

// handshakeTimeout bounds how long a client may take to identify itself.
const handshakeTimeout = 10 * time.Second

// listener accepts connections, finds out who is there and hands them on.
type listener struct {
	cfg ListenerConfig
	net.Listener
	tls                 *fresh[*tls.Config] // nil for cleartext
	allowed, ciphertext map[string]bool
	to                  *upstream
	log                 *slog.Logger
	metrics             *metrics

	mu         sync.Mutex
	lastLog    time.Time // of a failed handshake
	suppressed int       // since then
}

// clientConn is a connection that has been identified.
type clientConn struct {
	net.Conn
	outlet *h2.Outlet // what Conn writes to; nil within the process
	plain  bool       // and not over TLS
	id     *Identity
	http1  bool // and not HTTP/2
	once   sync.Once
	closed func()
}

// Close closes the connection. It may be called more than once.
func (c *clientConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.closed)
	return err
}

// listen checks cfg and binds its address.
func listen(cfg ListenerConfig, log *slog.Logger, m *metrics) (*listener, error) {
	l := &listener{cfg: cfg, log: log, metrics: m, allowed: set(cfg.AllowedClients), ciphertext: set(cfg.CiphertextClients)}
	if len(l.allowed)+len(l.ciphertext) > 0 && (cfg.TLS == nil || cfg.TLS.ClientCAFile == "") {
		return nil, fmt.Errorf("listener %s: allowedClients and ciphertextClients need TLS with clientCAFile", cfg.Address)
	}
	var err error
	if cfg.TLS != nil {
		if l.tls, err = cfg.TLS.serverTLS(log, cfg.Address); err != nil {
			return nil, fmt.Errorf("listener %s: %w", cfg.Address, err)
		}
	}
	if len(cfg.Sockets) > 0 {
		l.Listener = joined(cfg.Sockets)
	} else if path, ok := strings.CutPrefix(cfg.Address, "unix://"); ok {
		l.Listener, err = listenUnix(path, cfg.Mode)
	} else {
		l.Listener, err = net.Listen("tcp", cfg.Address)
	}
	if err != nil {
		return nil, fmt.Errorf("listener %s: %w", cfg.Address, err)
	}
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
var ErrNoFolder = errors.New("there is no such folder")

// unixListener removes its socket when it closes, unless another process has put its own there since.
type unixListener struct {
	*net.UnixListener
	path string
	own  fs.FileInfo
	once sync.Once
}

// listenUnix binds path with mode. A socket that stands there is replaced only if nobody answers on it. The socket is made beside its place and
// moved there, so that at no time a stranger can open it with looser permissions.
func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("socket path %q: must be absolute", path)
	}
	if mode == 0 {
		mode = 0o600
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode()&fs.ModeSocket == 0:
		return nil, fmt.Errorf("%s: exists and is not a socket", path)
	default:
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			_ = conn.Close()
			return nil, fmt.Errorf("%s: %w: another process answers on it", path, syscall.EADDRINUSE)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("see whether %s is in use: %w", path, err)
		}
	}
	folder := filepath.Dir(path)
	switch info, err := os.Stat(folder); {
	case errors.Is(err, fs.ErrNotExist), err == nil && !info.IsDir():
		return nil, fmt.Errorf("%s: %w", folder, ErrNoFolder)
	case err != nil:
		return nil, err
	}
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails
	beside := filepath.Join(folder, ".ekp-"+hex.EncodeToString(random[:]))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: beside, Net: "unix"})
	if err != nil {
		if op, ok := errors.AsType[*net.OpError](err); ok {
			err = op.Err // without a name that says nothing to anybody
		}
		return nil, fmt.Errorf("make a socket in %s: %w", folder, err)
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(beside, mode); err == nil {
		err = os.Rename(beside, path)
	}
	if err != nil {
		_ = l.Close()
		_ = os.Remove(beside)
		return nil, fmt.Errorf("place socket: %w", err)
	}
	own, err := os.Lstat(path)
	if err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("place socket: %w", err)
	}
	return &unixListener{UnixListener: l, path: path, own: own}, nil
}

// Addr is the socket's path; the one it was bound under is gone.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close stops listening and removes the socket.
func (l *unixListener) Close() error {
	l.once.Do(func() {
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.own) {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}

// run accepts until the listener is closed, and returns once every connection is handed on or gone. ctx bounds the handshakes.
func (l *listener) run(ctx context.Context, serve func(*clientConn)) {
	var handshakes sync.WaitGroup
	defer handshakes.Wait()
	pause := time.Duration(0)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			// The process may be out of file descriptors: others will be closed.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			l.log.Error("connections cannot be accepted", "listener", l.cfg.Address, "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		handshakes.Go(func() {
			if c, err := l.identify(ctx, conn); err != nil {
				_ = conn.Close()
				l.handshakeFailed(conn, err)
			} else {
				serve(c)
			}
		})
	}
}

// identify does the TLS handshake, if any, says who is there, and finds out what they speak.
func (l *listener) identify(ctx context.Context, conn net.Conn) (*clientConn, error) {
	id := &Identity{Listener: l.cfg.Address, Remote: conn.RemoteAddr().String(), to: l.to, advertise: l.cfg.AdvertiseClientURLs}
	outlet, protocol := h2.NewOutlet(conn), ""
	conn = outlet
	if l.tls != nil {
		limited, cancel := context.WithTimeout(ctx, handshakeTimeout)
		defer cancel()
		secure := tls.Server(conn, l.tls.get())
		if err := secure.HandshakeContext(limited); err != nil {
			return nil, err
		}
		state := secure.ConnectionState()
		if certs := state.PeerCertificates; len(certs) > 0 {
			id.identify(certs[0])
		}
		conn, protocol = secure, state.NegotiatedProtocol
	}
	id.authorise(l.allowed, l.ciphertext)
	http1 := protocol == protocolHTTP1
	if protocol == "" {
		var err error
		if conn, http1, err = sniff(ctx, conn); err != nil {
			return nil, err
		}
	}
	l.metrics.connections.WithLabelValues(l.cfg.Address).Inc()
	return &clientConn{Conn: conn, outlet: outlet, plain: l.tls == nil, id: id, http1: http1, closed: l.metrics.connections.WithLabelValues(l.cfg.Address).Dec}, nil
}

// handshakeFailed logs at most once a second, or a port scan would fill the log.
func (l *listener) handshakeFailed(conn net.Conn, err error) {
	l.metrics.handshakeFailures.WithLabelValues(l.cfg.Address).Inc()
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); now.Sub(l.lastLog) < time.Second {
		l.suppressed++
	} else {
		l.log.Warn("connection rejected", "listener", l.cfg.Address, "remote", conn.RemoteAddr().String(), "error", err, "notLoggedBefore", l.suppressed)
		l.lastLog, l.suppressed = now, 0
	}
}

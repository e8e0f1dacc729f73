package kmsdouble

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// server is an HTTP server, with TLS under a CA of its own, that waits for all of its connections
// when it ends. It is safe for concurrent use.
type server struct {
	scheme   string
	caFile   string
	ownDir   string // removed by Close
	listener net.Listener
	http     *http.Server
	stopped  chan struct{}  // closed by Close: ends whatever hangs
	serving  sync.WaitGroup // the accept loop and the connections

	violationsMu sync.Mutex
	violations   []string
}

// start starts a server. Without dir, the CA's certificate goes to a new temporary directory, which
// Close removes.
func start(name, dir, address string, plain bool, handler http.HandlerFunc) (*server, error) {
	s := &server{scheme: "https", stopped: make(chan struct{})}
	var err error
	if plain {
		s.scheme = "http"
		s.listener, err = net.Listen("tcp", cmp.Or(address, "127.0.0.1:0"))
	} else {
		err = s.listenTLS(name, dir, cmp.Or(address, "127.0.0.1:0"))
	}
	if err != nil {
		return nil, errors.Join(err, s.removeDir())
	}
	s.http = &http.Server{
		Handler:           handler,
		ErrorLog:          log.New(io.Discard, "", 0), // cut connections are what the double is for
		ReadHeaderTimeout: 10 * time.Second,
		ConnState:         s.trackConn,
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, new(connState))
		},
	}
	s.serving.Go(func() { _ = s.http.Serve(s.listener) })
	return s, nil
}

func (s *server) listenTLS(name, dir, address string) error {
	caPEM, certificate, err := newCertificates(time.Now())
	if err != nil {
		return err
	}
	if dir == "" {
		if dir, err = os.MkdirTemp("", "kmsdouble-"); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		s.ownDir = dir
	}
	s.caFile = filepath.Join(dir, name+"-ca.pem")
	if err := os.WriteFile(s.caFile, caPEM, 0o600); err != nil {
		return fmt.Errorf("write CA: %w", err)
	}
	s.listener, err = tls.Listen("tcp", address, &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12})
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return nil
}

// trackConn keeps Close waiting for connections.
func (s *server) trackConn(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		s.serving.Add(1)
	case http.StateClosed, http.StateHijacked:
		s.serving.Done()
	}
}

// Close ends all connections and waits for what is under way.
func (s *server) Close() error {
	select {
	case <-s.stopped:
		return nil
	default:
	}
	close(s.stopped)
	err := s.http.Close()
	s.serving.Wait()
	return errors.Join(err, s.removeDir())
}

func (s *server) removeDir() error {
	if s.ownDir == "" {
		return nil
	}
	return os.RemoveAll(s.ownDir)
}

// Endpoint returns "host:port", as a client's configuration wants it.
func (s *server) Endpoint() string { return s.listener.Addr().String() }

// URL returns the double's address with its scheme.
func (s *server) URL() string { return s.scheme + "://" + s.Endpoint() }

// CAFile returns the path of the PEM certificate that signed the double's own.
func (s *server) CAFile() string { return s.caFile }

// Violations returns what clients did that no client should, such as a plaintext in a URL or a
// parameter given twice.
func (s *server) Violations() []string {
	s.violationsMu.Lock()
	defer s.violationsMu.Unlock()
	return slices.Clone(s.violations)
}

func (s *server) violate(format string, args ...any) {
	s.violationsMu.Lock()
	defer s.violationsMu.Unlock()
	s.violations = append(s.violations, fmt.Sprintf(format, args...))
}

// cut takes the connection over, writes what is given, and closes it.
func (s *server) cut(w http.ResponseWriter, last []byte) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.violate("cut connection: %v", err)
		return
	}
	_, _ = conn.Write(last)
	_ = conn.Close()
}

// TB is the part of testing.TB that New needs.
type TB interface {
	Helper()
	Cleanup(func())
	Fatal(args ...any)
	Errorf(format string, args ...any)
}

// endWith closes the server at the end of the test, which fails if a client misused it.
func (s *server) endWith(tb TB, what string) {
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Errorf("close the %s double: %v", what, err)
		}
		for _, v := range s.Violations() {
			tb.Errorf("the %s double was misused: %s", what, v)
		}
	})
}

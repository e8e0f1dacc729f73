package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// TestSilenceEnds: how long a client may take over its first bytes, over a TLS handshake, over the headers of a request, and between two requests.
func TestSilenceEnds(t *testing.T) {
	ca := newAuthority(t, "ca")
	cert, key, _ := ca.issue("server", "server")
	secure, err := (&ListenerTLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.file}).serverTLS(slog.New(slog.DiscardHandler), "x")
	if err != nil {
		t.Fatal(err)
	}
	m, err := newMetrics(nil)
	if err != nil {
		t.Fatal(err)
	}
	identify := func(l *listener) func(conn net.Conn) {
		l.log, l.metrics = slog.New(slog.DiscardHandler), m
		return func(conn net.Conn) {
			if _, err := l.identify(context.Background(), conn); !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v", err)
			}
			conn.Close()
		}
	}
	for name, tt := range map[string]struct {
		says  string
		after time.Duration
		serve func(conn net.Conn)
	}{
		"nothing":           {"", sniffTimeout, identify(&listener{})},
		"half a preface":    {"PR", sniffTimeout, identify(&listener{})},
		"TLS, nothing":      {"", handshakeTimeout, identify(&listener{tls: secure})},
		"TLS, half a hello": {"\x16\x03\x01", handshakeTimeout, identify(&listener{tls: secure})},
		"half a header":     {"GET /health HTTP/1.1\r\nHost", headerTimeout, nil},
		"no other request":  {"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", idleTimeout, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				if tt.serve != nil {
					go tt.serve(far)
				} else {
					g, err := newGateway(&api{core: newCore(nil, DefaultMaxRequestBytes, nil)})
					if err != nil {
						t.Fatal(err)
					}
					ctx, cancel := context.WithCancel(t.Context())
					go g.run(ctx, time.Second)
					defer cancel()
					go g.serve(&clientConn{Conn: far, id: &Identity{}, closed: func() {}})
				}
				begun := time.Now()
				if tt.says != "" {
					go func() { _, _ = io.WriteString(near, tt.says) }()
				}
				_, _ = io.Copy(io.Discard, near)
				near.Close()
				if took := time.Since(begun); took != tt.after {
					t.Errorf("let go after %v, want %v", took, tt.after)
				}
			})
		})
	}
}

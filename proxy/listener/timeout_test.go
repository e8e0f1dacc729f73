package listener

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

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
)

// TestSilentClientsEnd: how long a client may take over its first bytes, and over a TLS handshake.
func TestSilentClientsEnd(t *testing.T) {
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	secure, err := (&TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File}).serverTLS(slog.New(slog.DiscardHandler), "x")
	if err != nil {
		t.Fatal(err)
	}
	m, err := metrics.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	identify := func(l *Listener) func(conn net.Conn) {
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
		"nothing":           {"", detectTimeout, identify(&Listener{})},
		"half a preface":    {"PR", detectTimeout, identify(&Listener{})},
		"TLS, nothing":      {"", HandshakeTimeout, identify(&Listener{TLS: secure})},
		"TLS, half a hello": {"\x16\x03\x01", HandshakeTimeout, identify(&Listener{TLS: secure})},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				go tt.serve(far)
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

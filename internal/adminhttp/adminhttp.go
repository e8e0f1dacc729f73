// Package adminhttp serves metrics, health and profiles to operators, over HTTP without TLS.
package adminhttp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
)

// Config says what is served, and where. There is no authentication: the address belongs on
// loopback.
type Config struct {
	Address  string // host:port; port 0 takes any
	Gatherer prometheus.Gatherer
	Ready    func() readiness.Report
	Pprof    bool // serve /debug/pprof/ too
	Logger   *slog.Logger
}

// Server serves /metrics, /livez and /readyz.
type Server struct {
	listener net.Listener
	server   *http.Server
}

// New binds the address. One of Run and Close must follow.
func New(cfg Config) (*Server, error) {
	mux := http.NewServeMux()
	// The OpenMetrics format, for scrapers that ask for it, has exemplars.
	mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Gatherer, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { writeText(w, http.StatusOK, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		report, code := cfg.Ready(), http.StatusOK
		if !report.Ready {
			code = http.StatusServiceUnavailable
		}
		writeText(w, code, report.String())
	})
	if cfg.Pprof {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	l, err := net.Listen("tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("admin: %w", err)
	}
	return &Server{listener: l, server: &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelWarn),
	}}, nil
}

func writeText(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(text)) // a reader that has gone needs no answer
}

// Addr is the bound address.
func (a *Server) Addr() net.Addr { return a.listener.Addr() }

// Run serves until ctx ends, and returns nil then.
func (a *Server) Run(ctx context.Context) error {
	stopped := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(stopped)
		grace, done := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer done()
		if a.server.Shutdown(grace) != nil {
			_ = a.server.Close()
		}
	})
	err := a.server.Serve(a.listener)
	if !cancel() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve admin: %w", err)
}

// Close releases the address without serving.
func (a *Server) Close() { _ = a.listener.Close() }

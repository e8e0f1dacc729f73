package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// ReadyReport is what /readyz answers.
type ReadyReport struct {
	// Ready is false only when nothing can be served. A rule that cannot serve is a check that is
	// not OK, in a report that is ready.
	Ready  bool
	Checks []Check
}

// Check is one line of a report, for example {"rule /registry/secrets/", false, "KMS ack is
// unavailable"}. It never holds a value or a key's bytes.
type Check struct {
	Name   string
	OK     bool
	Detail string
}

// String is the report as text, in the form that Kubernetes' components use.
func (r ReadyReport) String() string {
	var b strings.Builder
	for _, c := range r.Checks {
		mark, detail := "[+]", " ok"
		if !c.OK {
			mark, detail = "[-]", " failed"
		}
		if c.Detail != "" {
			detail = ": " + strings.ReplaceAll(c.Detail, "\n", " ")
		}
		b.WriteString(mark + c.Name + detail + "\n")
	}
	if r.Ready {
		b.WriteString("readyz check passed\n")
	} else {
		b.WriteString("readyz check failed\n")
	}
	return b.String()
}

// AdminConfig is the server for operators. It has no authentication: its address belongs on
// loopback.
type AdminConfig struct {
	Address  string              // host:port; port 0 takes any
	Gatherer prometheus.Gatherer // nil: /metrics is empty
	Ready    func() ReadyReport  // required
	Pprof    bool                // serve /debug/pprof/ too
	Logger   *slog.Logger        // nil: nothing is logged
}

// Admin serves /metrics, /livez and /readyz.
type Admin struct {
	listener net.Listener
	server   *http.Server
}

// NewAdmin binds the address. One of Run and Close must follow.
func NewAdmin(cfg AdminConfig) (*Admin, error) {
	if cfg.Ready == nil {
		return nil, errors.New("admin: no readiness to report")
	}
	gatherer := cfg.Gatherer
	if gatherer == nil {
		gatherer = prometheus.NewRegistry()
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	mux := http.NewServeMux()
	// The OpenMetrics format, for scrapers that ask for it, has exemplars.
	mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{EnableOpenMetrics: true}))
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
	return &Admin{listener: l, server: &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}}, nil
}

func writeText(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(text)) // a reader that has gone needs no answer
}

// Addr is the bound address.
func (a *Admin) Addr() net.Addr { return a.listener.Addr() }

// Run serves until ctx ends, and returns nil then.
func (a *Admin) Run(ctx context.Context) error {
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

// Close lets go of the address without serving.
func (a *Admin) Close() { _ = a.listener.Close() }

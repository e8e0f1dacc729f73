package adminhttp

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
)

// TestServer: each path, in the states that a report can have.
func TestServer(t *testing.T) {
	requests := prometheus.NewCounter(prometheus.CounterOpts{Name: "requests_total", Help: "Requests."})
	registry := prometheus.NewRegistry()
	registry.MustRegister(requests)
	report := readiness.Report{Ready: true, Checks: []readiness.Check{
		{Name: "listeners", OK: true}, {Name: "bypass"}, {Name: "rule /registry/secrets/", Detail: "KMS ack:\n\x1b unavailable"},
	}}
	const checks = "[+]listeners ok\n[-]bypass failed\n[-]rule /registry/secrets/: KMS ack:; \\x1b unavailable\n"
	for _, pprof := range []bool{false, true} {
		s, err := New(Config{
			Address: "127.0.0.1:0", Gatherer: registry, Ready: func() readiness.Report { return report }, Pprof: pprof, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- s.Run(ctx) }()
		get := func(path string) (int, string) {
			res, err := http.Get("http://" + s.Addr().String() + path)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			return res.StatusCode, string(body)
		}
		for _, c := range []struct {
			path  string
			ready bool
			code  int
			body  string // its beginning
		}{
			{"/livez", false, http.StatusOK, "ok\n"},
			{"/readyz", true, http.StatusOK, checks + "readyz check passed\n"},
			{"/readyz", false, http.StatusServiceUnavailable, checks + "readyz check failed\n"},
			{"/metrics", true, http.StatusOK, "# HELP requests_total Requests.\n"},
			{"/debug/pprof/cmdline", true, map[bool]int{true: http.StatusOK, false: http.StatusNotFound}[pprof], ""},
		} {
			report.Ready = c.ready
			if code, body := get(c.path); code != c.code || !strings.HasPrefix(body, c.body) {
				t.Errorf("%s: %d %q, want %d %q", c.path, code, body, c.code, c.body)
			}
		}
		http.DefaultClient.CloseIdleConnections()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

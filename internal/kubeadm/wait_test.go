package kubeadm

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestWaitProxyReloaded has a proxy whose metrics change while the node waits.
func TestWaitProxyReloaded(t *testing.T) {
	const before = "process_start_time_seconds 1\n" + reloadsMetric + `{outcome="applied"} 2` + "\n" + reloadsMetric + `{outcome="failed"} 3` + "\n"
	for name, tt := range map[string]struct {
		after, ready string
		want         string // in the error, "" for none
	}{
		"applied":                 {after: strings.Replace(before, "} 2", "} 3", 1)},
		"restarted":               {after: strings.Replace(before, "seconds 1", "seconds 2", 1)},
		"rejected":                {after: strings.Replace(before, "} 3", "} 4", 1), want: "the proxy rejected it"},
		"nothing happens":         {after: before, want: "within 3s: the proxy has not yet read the file"},
		"applied, with a bad KMS": {after: strings.Replace(before, "} 2", "} 3", 1), ready: "[-]kms main: down\n", want: "[-]kms main: down"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var page atomic.Pointer[string]
			page.Store(new(before))
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/readyz" {
					fmt.Fprint(w, tt.ready)
					return
				}
				fmt.Fprint(w, *page.Load())
			}))
			defer s.Close()
			n := &Node{Settings: Settings{Admin: s.Listener.Addr().String()}, Timeout: 3 * time.Second}
			had, err := n.proxyMetrics(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			page.Store(&tt.after)
			begin := time.Now()
			err = n.waitProxyReloaded(t.Context(), had)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if errors.Is(err, errFinal) && time.Since(begin) > n.Timeout {
				t.Error("it waited although the proxy has rejected the file")
			}
		})
	}
	n := &Node{Settings: Settings{Admin: "127.0.0.1:1"}, Timeout: time.Millisecond}
	if err := n.waitProxyReloaded(context.Background(), nil); err == nil {
		t.Error("no error without a proxy")
	}
}

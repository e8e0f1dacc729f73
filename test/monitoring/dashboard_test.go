package monitoring

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// empty are the panels that show nothing in this run, each with the reason.
var empty = map[string]string{
	"Re-encryption": "nothing is re-encrypted",
}

// TestDashboard runs every query of the Grafana dashboard in a real Prometheus that scrapes a real
// proxy, while the KMS key is rotated, disabled and enabled again. MONITORING_PICTURE=FILE.svg
// draws some of the panels.
func TestDashboard(t *testing.T) {
	bin := program(t, "prometheus")
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{Name: "etcd"})
	kms := env.NewKMS("acme")
	kms.Start()
	proxy := env.NewProxy("proxy", harness.ProxyConfig{
		Etcd:  harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS:   []harness.KMSConfig{kms.Config("acme")},
		Rules: []harness.Rule{{Prefix: "/registry/secrets/", WriteWith: "acme"}},
	})
	proxy.Args = []string{"--scan-interval", "2s"}
	proxy.Start()
	proxy.WaitReady(30 * time.Second)

	address := harness.FreeAddress(t)
	p := prometheus{t: t, url: "http://" + address}
	config := env.File("prometheus.yaml", fmt.Appendf(nil, `
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
- job_name: etcd-kms-proxy
  static_configs: [{targets: [%q]}]
`, absolute(t, "rules.yaml"), proxy.Config.Admin.Address))
	server := exec.Command(bin, "--config.file="+config, "--storage.tsdb.path="+filepath.Join(env.Dir, "tsdb"), "--web.listen-address="+address, "--log.level=warn")
	server.Stdout, server.Stderr = os.Stderr, os.Stderr
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Signal(os.Interrupt)
		_ = server.Wait()
	})
	harness.Eventually(t, 30*time.Second, "Prometheus to scrape the proxy", func() error {
		return p.has(`up == 1`)
	})

	// What an operator sees on a bad day. Each step ends when Prometheus shows it.
	began := time.Now()
	stop := load(t, proxy)
	harness.Eventually(t, time.Minute, "values to be encrypted and read", func() error {
		return p.has(`rate(etcd_kms_proxy_values_sealed_total{outcome="ok"}[10s]) > 0 and on () rate(etcd_kms_proxy_values_opened_total{outcome="ok"}[10s]) > 0`)
	})
	kms.Rotate()
	harness.Eventually(t, time.Minute, "the rotation to be seen", func() error {
		return p.has(fmt.Sprintf(`etcd_kms_proxy_kms_key_info{key_id=%q} == 1`, kms.KeyID()))
	})
	kms.Disable(true)
	harness.Eventually(t, time.Minute, "the key to be seen as revoked", func() error { return p.has(`ALERTS{alertname="EtcdKMSProxyKeyRevoked",alertstate="firing"}`) })
	harness.Eventually(t, time.Minute, "writes to fail", func() error {
		return p.has(`rate(etcd_kms_proxy_requests_total{code="FailedPrecondition"}[10s]) > 0`)
	})
	kms.Disable(false)
	harness.Eventually(t, time.Minute, "the key to be used again", func() error {
		return p.has(`etcd_kms_proxy_kms_key_revoked == 0 and on () etcd_kms_proxy_kms_can_seal == 1 unless on () ALERTS{alertname="EtcdKMSProxyKeyRevoked"}`)
	})
	harness.Eventually(t, time.Minute, "a value to be stored as its rule says", func() error { return p.has(`etcd_kms_proxy:stored_values_current:ratio`) })
	stop()

	for _, panel := range dashboard(t) {
		shown := false
		for _, target := range panel.Targets {
			series := p.series(expand(target.Expr), began, time.Now())
			shown = shown || len(series) > 0
		}
		if _, none := empty[panel.Title]; !shown && !none {
			t.Errorf("panel %q shows nothing", panel.Title)
		}
	}
	if path := os.Getenv("MONITORING_PICTURE"); path != "" {
		draw(t, p, path, began, time.Now())
	}
}

// load writes and reads under the rule until stop is called. Failures are what the run is about.
func load(t *testing.T, proxy *harness.Proxy) (stop func()) {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{proxy.URL()}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			key := "/registry/secrets/default/s" + strconv.Itoa(i%20)
			call, end := context.WithTimeout(ctx, 5*time.Second)
			_, _ = client.Put(call, key, "a value that nobody needs to know")
			_, _ = client.Get(call, key)
			end()
		}
	}()
	return func() {
		cancel()
		<-done
		client.Close()
	}
}

type panel struct {
	Title, Type string
	Targets     []struct{ Expr, LegendFormat string }
}

func dashboard(t *testing.T) (shown []panel) {
	t.Helper()
	var file struct{ Panels []panel }
	if err := json.Unmarshal(read(t, filepath.Join(folder, "dashboard.json")), &file); err != nil {
		t.Fatal(err)
	}
	for _, p := range file.Panels {
		if p.Type != "row" {
			shown = append(shown, p)
		}
	}
	if len(shown) == 0 {
		t.Fatal("the dashboard has no panels")
	}
	return shown
}

// expand puts values in the place of Grafana's variables.
func expand(expression string) string {
	return strings.NewReplacer("$__rate_interval", "10s", "$job", ".*", "$instance", ".*").Replace(expression)
}

// prometheus is a client of Prometheus' HTTP API.
type prometheus struct {
	t   *testing.T
	url string
}

type series struct {
	Metric map[string]string
	Value  [2]any   // of an instant query: seconds, text
	Values [][2]any // of a range query
}

// has returns an error unless the query has a result now.
func (p prometheus) has(query string) error {
	found, err := p.ask("/api/v1/query", url.Values{"query": {query}})
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("%s has no result", query)
	}
	return err
}

// series is the result of a range query, every second.
func (p prometheus) series(query string, from, to time.Time) []series {
	p.t.Helper()
	stamp := func(at time.Time) string { return strconv.FormatFloat(float64(at.UnixMilli())/1000, 'f', 3, 64) }
	found, err := p.ask("/api/v1/query_range", url.Values{"query": {query}, "start": {stamp(from)}, "end": {stamp(to)}, "step": {"1"}})
	if err != nil {
		p.t.Errorf("%s: %v", query, err)
	}
	return found
}

func (p prometheus) ask(path string, form url.Values) ([]series, error) {
	client := http.Client{Timeout: 10 * time.Second}
	response, err := client.PostForm(p.url+path, form)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var answer struct {
		Error string
		Data  struct{ Result []series }
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Error != "" {
		return nil, fmt.Errorf("%s", answer.Error)
	}
	return answer.Data.Result, nil
}

func absolute(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(folder, name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

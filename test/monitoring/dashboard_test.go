package monitoring

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestDashboard runs every query of the Grafana dashboard and every rule in two real Prometheus
// servers, one of them with native histograms, that scrape a real proxy while the KMS key is
// rotated, disabled and enabled again, and while plaintext is written to etcd directly.
// MONITORING_PICTURE=FILE.svg draws some of the panels, of a run with longer steps.
func TestDashboard(t *testing.T) {
	bin := program(t, "prometheus")
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{Name: "etcd"})
	kms := env.NewKMS("acme")
	kms.Start()
	proxy := startProxy(env, etcd, kms)
	classic, native := startPrometheus(env, bin, proxy), startPrometheus(env, bin, proxy, "--enable-feature=native-histograms")
	eventually := func(what, query string) {
		t.Helper()
		for _, p := range []prometheus{classic, native} {
			harness.Eventually(t, time.Minute, what, func() error { return p.has(query) })
		}
	}
	picture := os.Getenv("MONITORING_PICTURE")
	hold := func() {
		if picture != "" {
			time.Sleep(15 * time.Second) // to look good
		}
	}

	// What an operator sees during an incident. Each step ends when Prometheus shows it.
	began := time.Now()
	stop := load(t, proxy)
	eventually("values to be encrypted and read",
		`rate(etcd_kms_proxy_values_encrypted_total{outcome="ok"}[10s]) > 0 and on () rate(etcd_kms_proxy_values_decrypted_total{outcome="ok"}[10s]) > 0`)
	hold()
	kms.Rotate()
	eventually("the rotation to be seen", fmt.Sprintf(`etcd_kms_proxy_kms_key_info{key_id=%q} == 1`, kms.KeyID()))
	hold()
	kms.Disable(true)
	eventually("the key to be seen as revoked", `ALERTS{alertname="EtcdKMSProxyKeyRevoked",alertstate="firing"}`)
	eventually("writes to fail", `sum(rate(etcd_kms_proxy_requests_total{code="FailedPrecondition"}[10s])) > 0`)
	eventually("the scan to find that the values cannot be decrypted", `ALERTS{alertname="EtcdKMSProxyUndecryptableValues",alertstate="firing"}`)
	hold()
	kms.Disable(false)
	eventually("the key to be used again",
		`etcd_kms_proxy_kms_key_revoked{provider="acme"} == 0 and on () etcd_kms_proxy_kms_can_encrypt{provider="acme"} == 1 unless on () ALERTS{alertname="EtcdKMSProxyKeyRevoked"}`)
	hold()
	putPlaintext(t, etcd)
	eventually("the plaintext to be noticed", `ALERTS{alertname="EtcdKMSProxyPlaintextWritten",alertstate="firing"}`)
	eventually("the values to be stored as their rule says", `etcd_kms_proxy:stored_values_current:ratio == 1`)
	hold()
	stop()
	ended := time.Now().Add(time.Second) // with the last result

	for what, p := range map[string]prometheus{"classic histograms": classic, "native histograms": native} {
		for _, panel := range dashboard(t) {
			shown := false
			for _, target := range panel.Targets {
				series := p.series(expand(target.Expr), began, ended)
				shown = shown || len(series) > 0
			}
			if !shown {
				t.Errorf("with %s, panel %q shows nothing", what, panel.Title)
			}
		}
		for _, r := range rules(t) {
			if r.Record != "" && len(p.series(r.Record, began, ended)) == 0 {
				t.Errorf("with %s, %s was not recorded", what, r.Record)
			}
		}
		// The certificates are valid for a day. Recovery copies are not used for values of a key
		// that was disabled.
		fired := make(map[string]bool)
		for _, s := range p.series(`count by (alertname) (ALERTS{alertstate="firing"})`, began, ended) {
			fired[s.Metric["alertname"]] = true
		}
		want := []string{"EtcdKMSProxyCertificateExpires", "EtcdKMSProxyKeyRevoked", "EtcdKMSProxyPlaintextWritten", "EtcdKMSProxyUndecryptableValues"}
		if got := slices.Sorted(maps.Keys(fired)); !slices.Equal(got, want) {
			t.Errorf("with %s, the alerts are %v, want %v", what, got, want)
		}
	}
	checkLabels(t, classic)
	if picture != "" {
		draw(t, classic, picture, began, ended)
	}
}

// checkLabels checks that metrics have every label that rules and dashboard select by.
func checkLabels(t *testing.T, p prometheus) {
	t.Helper()
	var expressions []string
	for _, r := range rules(t) {
		expressions = append(expressions, r.Expr)
	}
	for _, panel := range dashboard(t) {
		for _, target := range panel.Targets {
			expressions = append(expressions, target.Expr)
		}
	}
	checked := 0
	for _, expression := range expressions {
		for _, selector := range regexp.MustCompile(`(\betcd_kms_proxy_\w+)\{([^}]*)\}`).FindAllStringSubmatch(expression, -1) {
			name := selector[1]
			if p.has(name) != nil {
				continue // such as the warnings about keys, of which there are none
			}
			for _, label := range regexp.MustCompile(`(\w+)(=~|!~|!=|=)"`).FindAllStringSubmatch(selector[2], -1) {
				checked++
				if err := p.has(name + "{" + label[1] + `!=""}`); err != nil {
					t.Errorf("%s: %v", expression, err)
				}
			}
		}
	}
	if checked == 0 {
		t.Error("no label was checked")
	}
}

// startProxy starts a proxy that has every metric that it can have without TLS to etcd: TLS from
// clients, and etcd without.
func startProxy(env *harness.Env, etcd *harness.Etcd, kms *harness.KMS) *harness.Proxy {
	env.TB.Helper()
	ca := env.NewCA("clients")
	server, client := ca.Server("server"), ca.Client("client", "client")
	proxy := env.NewProxy("proxy", harness.ProxyConfig{
		Listeners: []harness.Listener{{
			Address: harness.FreeAddress(env.TB), TLS: &harness.ServerTLS{CertFile: server.CertFile, KeyFile: server.KeyFile, ClientCAFile: ca.File},
		}},
		Etcd:  harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS:   []harness.KMSConfig{kms.Config("acme"), env.LocalKey("dr", 1)},
		Rules: []harness.Rule{{Prefix: "/registry/secrets/", WriteWith: "acme", Recovery: []string{"dr"}}},
		Audit: &harness.Audit{Path: filepath.Join(env.Dir, "audit.jsonl")},
	})
	proxy.TLS = ca.ClientTLS(client)
	proxy.Args = []string{"--scan-interval", "2s", "--reencrypt", "--reencrypt-interval", "2s"}
	proxy.Start()
	proxy.WaitReady(30 * time.Second)
	return proxy
}

// startPrometheus starts a server that has scraped the proxy when it returns.
func startPrometheus(env *harness.Env, bin string, proxy *harness.Proxy, args ...string) prometheus {
	t := env.TB
	t.Helper()
	address := harness.FreeAddress(t)
	name := "prometheus-" + address[strings.LastIndexByte(address, ':')+1:]
	file, err := filepath.Abs(filepath.Join(folder, "rules.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	config := env.File(name+".yaml", fmt.Appendf(nil, `
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
- job_name: etcd-kms-proxy
  static_configs: [{targets: [%q]}]
`, file, proxy.Config.Admin.Address))
	server := exec.Command(bin, append([]string{
		"--config.file=" + config, "--storage.tsdb.path=" + filepath.Join(env.Dir, name), "--web.listen-address=" + address, "--log.level=warn",
	}, args...)...)
	server.Stdout, server.Stderr = os.Stderr, os.Stderr
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Signal(os.Interrupt)
		_ = server.Wait()
	})
	p := prometheus{t: t, url: "http://" + address}
	harness.Eventually(t, 30*time.Second, "Prometheus to scrape the proxy", func() error { return p.has(`up == 1`) })
	return p
}

// putPlaintext writes a value under the rule to etcd directly.
func putPlaintext(t *testing.T, etcd *harness.Etcd) {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd.URL}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := client.Put(ctx, "/registry/secrets/default/direct", "not encrypted"); err != nil {
		t.Fatal(err)
	}
}

// TestCountersBeginAtZero checks that every counter whose increase is used by an alert exists
// before its first event, which would not count as an increase otherwise.
func TestCountersBeginAtZero(t *testing.T) {
	env := harness.New(t)
	kms := env.NewKMS("acme")
	kms.Start()
	page := startProxy(env, env.StartEtcd(harness.EtcdConfig{Name: "etcd"}), kms).Scrape()
	for _, r := range rules(t) {
		for _, m := range regexp.MustCompile(`increase\((\w+)`).FindAllStringSubmatch(r.Expr, -1) {
			if !regexp.MustCompile(`(?m)^` + m[1] + `(\{.*\})? 0$`).MatchString(page) {
				t.Errorf("%s: there is no %s that is 0", r.Alert, m[1])
			}
		}
	}
}

// load writes and reads under the rule until stop is called. Failures are expected.
func load(t *testing.T, proxy *harness.Proxy) (stop func()) {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{proxy.URL()}, TLS: proxy.TLS, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
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
	FieldConfig struct{ Defaults struct{ Unit string } }
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

// expand replaces Grafana's variables.
func expand(expression string) string {
	return strings.NewReplacer("$__rate_interval", "10s", "$job", ".*", "$instance", ".*").Replace(expression)
}

// prometheus is a client of Prometheus' HTTP API.
type prometheus struct {
	t   testing.TB
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

// series returns the result of a range query, with a step of a second.
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

// Package recovery loses keys permanently under a real proxy and a real etcd: values with recovery
// copies can still be read, the proxy reports that it uses the copies, and the values move to a new
// key.
package recovery

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	prefix = "/sealed/"
	within = 30 * time.Second
)

// site is an etcd behind a proxy that a test restarts.
type site struct {
	env   *harness.Env
	etcd  *harness.Etcd
	raw   pb.KVClient // directly to etcd
	proxy *harness.Proxy
	kv    pb.KVClient // through the proxy
	runs  int
	want  map[string]string // what was written under the rule
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{env: harness.New(t), want: map[string]string{}}
	s.start(t)
	return s
}

// start starts a new etcd.
func (s *site) start(t *testing.T) {
	t.Helper()
	s.etcd = s.env.StartEtcd(harness.EtcdConfig{Name: fmt.Sprint("etcd", s.runs)})
	s.raw = pb.NewKVClient(harness.Dial(t, s.etcd.Address, nil))
}

// run stops the proxy and starts one with this rule, in front of the same etcd.
func (s *site) run(t *testing.T, rule harness.Rule, kms ...harness.KMSConfig) {
	t.Helper()
	if s.proxy != nil && !s.proxy.Stop(within) {
		t.Fatal("the proxy does not end")
	}
	s.runs++
	rule.Prefix = prefix
	s.proxy = s.env.StartProxy(fmt.Sprint("proxy", s.runs), harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{s.etcd.URL}}, KMS: kms, Rules: []harness.Rule{rule},
		Cache: &harness.Cache{RevokeWithin: "2s"}, Audit: &harness.Audit{Path: s.auditPath(), Required: true},
	})
	s.kv = pb.NewKVClient(harness.Dial(t, s.proxy.Address, nil))
}

func (s *site) auditPath() string    { return filepath.Join(s.env.Dir, "audit.jsonl") }
func (s *site) commandsPath() string { return filepath.Join(s.env.Dir, "audit.commands.jsonl") }

// put writes a value through the proxy.
func (s *site) put(t *testing.T, key, value string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	_, err := s.kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	if err == nil && strings.HasPrefix(key, prefix) {
		s.want[key] = value
	}
	return err
}

// fill writes n new values under the rule.
func (s *site) fill(t *testing.T, name string, n int) {
	t.Helper()
	for i := range n {
		if err := s.put(t, fmt.Sprint(prefix, name, i), s.env.Sealed.Value(name)); err != nil {
			t.Fatal(err)
		}
	}
}

// all reads everything under the rule, in one range.
func all(t *testing.T, kv pb.KVClient) (map[string]string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	r, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(prefix), RangeEnd: []byte("/sealed0")})
	if err != nil {
		return nil, err
	}
	got := map[string]string{}
	for _, kv := range r.Kvs {
		got[string(kv.Key)] = string(kv.Value)
	}
	return got, nil
}

// reads checks that everything written can be read through the proxy, one by one and in a list.
func (s *site) reads(t *testing.T) {
	t.Helper()
	list, err := all(t, s.kv)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != len(s.want) {
		t.Errorf("%d values are listed, want %d", len(list), len(s.want))
	}
	for key, want := range s.want {
		r, err := s.kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})
		if err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != want || list[key] != want {
			t.Errorf("%s is not what was written: %v", key, err)
		}
	}
}

// copies returns which provider encrypted the value of a key in etcd, and which providers have
// recovery copies in it.
func (s *site) copies(t *testing.T, key string) (provider string, by []string) {
	t.Helper()
	r, err := s.raw.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})
	if err != nil || len(r.Kvs) != 1 {
		t.Fatalf("%s: %v", key, err)
	}
	name, object, ok := envelope.Split(r.Kvs[0].Value)
	if !ok {
		t.Fatalf("%s is not sealed", key)
	}
	o, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	for a := range o.Annotations {
		if p, ok := envelope.RecoveryProvider(a); ok {
			by = append(by, p)
		}
	}
	return string(name), by
}

// says waits for a line of readyz and of the metrics.
func (s *site) says(t *testing.T, check, metric string) {
	t.Helper()
	harness.Eventually(t, within, "readyz to say "+check, func() error {
		if report := s.proxy.Report(); !strings.Contains(report, check) {
			return fmt.Errorf("it says %s", report)
		}
		return s.proxy.Alive()
	})
	if !strings.Contains(s.proxy.Scrape(), metric) {
		t.Errorf("the metrics have no %s", metric)
	}
}

// refused checks the response to a write under the rule.
func (s *site) refused(t *testing.T, code codes.Code, words ...string) {
	t.Helper()
	err := s.put(t, prefix+"refused", s.env.Sealed.Value("refused"))
	for _, w := range append(words, "etcd-kms-proxy: ", prefix) {
		if status.Code(err) != code || !strings.Contains(err.Error(), w) {
			t.Errorf("a write: %v, want %v with %q", err, code, w)
		}
	}
}

// recoveries returns how often the proxy's audit log contains each pair of providers, "primary by
// provider".
func (s *site) recoveries(t *testing.T) map[string]int {
	t.Helper()
	return s.recoveriesIn(t, s.auditPath())
}

func (s *site) recoveriesIn(t *testing.T, path string) map[string]int {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for line := range bytes.Lines(data) {
		var r struct{ Event, Primary, Provider, KeyID, Reason string }
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatal(err)
		}
		if r.Event == "recovery" {
			count[r.Primary+" by "+r.Provider]++
			if r.KeyID == "" || r.Reason == "" {
				t.Errorf("a record without key ID or reason: %s", line)
			}
		}
	}
	return count
}

// unreachable returns a provider that never answers.
func (s *site) unreachable(name string) harness.KMSConfig {
	return harness.KMSConfig{Name: name, PollInterval: "1s", Plugin: &harness.PluginKMS{Endpoint: "unix://" + filepath.Join(s.env.Dir, "none.sock"), Timeout: "500ms"}}
}

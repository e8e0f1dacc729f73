// Package reencrypt tests `etcd-kms-proxy reencrypt` on real etcds, with concurrent clients and
// under faults.
package reencrypt

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	prefix = "/sealed/"
	within = 60 * time.Second
	marker = "k8s:enc:kms:v2:"
)

// site is an etcd, a KMS, and a configuration for both.
type site struct {
	*harness.Env
	t    testing.TB
	conn *grpc.ClientConn // directly to etcd
	kv   pb.KVClient
	kms  *harness.KMS
	cfg  harness.ProxyConfig
}

// newSite starts an etcd and a KMS. The etcd stores plaintext, so its files may contain it.
func newSite(t testing.TB, etcd harness.EtcdConfig) (*site, *harness.Etcd) {
	t.Helper()
	s := &site{Env: harness.New(t), t: t}
	etcd.Bare = true
	e := s.StartEtcd(etcd)
	s.on(e.Address, e.URL)
	return s, e
}

// on returns a site with an existing etcd.
func (s *site) on(address string, urls ...string) {
	s.conn = harness.Dial(s.t, address, nil)
	s.kv = pb.NewKVClient(s.conn)
	s.kms = s.NewKMS("main")
	s.kms.Start()
	s.cfg = harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: urls}, KMS: []harness.KMSConfig{s.kms.Config("main"), s.LocalKey("dev", 1)},
		Rules: []harness.Rule{{Prefix: prefix, WriteWith: "main", ReadWith: []string{"dev"}, AllowPlaintextReads: new(true)}},
	}
}

// plaintextRule is the configuration that turns encryption off.
func (s *site) plaintextRule() harness.ProxyConfig {
	c := s.cfg
	c.Rules = []harness.Rule{{Prefix: prefix, WriteWith: "plaintext", ReadWith: []string{"main", "dev"}, AllowPlaintextReads: new(true)}}
	return c
}

// config writes a configuration file.
func (s *site) config(name string, c harness.ProxyConfig) string {
	return s.NewProxy(name, c).ConfigFile
}

func (s *site) put(key string, value []byte, lease int64) {
	s.t.Helper()
	if _, err := s.kv.Put(s.t.Context(), &pb.PutRequest{Key: []byte(key), Value: value, Lease: lease}); err != nil {
		s.t.Fatalf("put %s: %v", key, err)
	}
}

// get reads one key; nil if there is none.
func get(t testing.TB, kv pb.KVClient, key string) *mvccpb.KeyValue {
	t.Helper()
	r, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if len(r.Kvs) == 0 {
		return nil
	}
	return r.Kvs[0]
}

// all reads the keys below the prefix.
func all(t testing.TB, kv pb.KVClient) []*mvccpb.KeyValue {
	t.Helper()
	r, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(prefix), RangeEnd: []byte("/sealed0")})
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	return r.Kvs
}

// report is the command's JSON report.
type report struct {
	OK, Interrupted                                       bool
	Passes, Keys, Current, Rewritten, Transactions, Raced int64
	Decrypted                                             int64
	Foreign, Plaintext, Undecryptable, Refused, Failed    int64
	Left                                                  []struct{ Key, Why string }
	Revisions                                             struct{ First, Last int64 }
}

// reencrypt runs the command to its end, and checks its exit code.
func (s *site) reencrypt(config string, code int, args ...string) (r report, output string) {
	s.t.Helper()
	out, got := s.Run(append([]string{"reencrypt", "--config", config, "--output", "json"}, args...)...)
	if got != code {
		s.t.Fatalf("reencrypt %q: exit code %d, want %d: %s", args, got, code, out)
	}
	return decode(s.t, out), out
}

// decode finds the report among the log lines.
func decode(t testing.TB, out string) (r report) {
	t.Helper()
	begin, end := strings.Index(out, "{\n"), strings.LastIndex(out, "\n}")
	if begin < 0 || end < begin {
		return r
	}
	if err := json.Unmarshal([]byte(out[begin:end+2]), &r); err != nil {
		t.Fatalf("the report: %v\n%s", err, out)
	}
	return r
}

// fill puts n plaintext values of mixed sizes and returns them. Few are large.
func (s *site) fill(n int) map[string][]byte {
	s.t.Helper()
	values := make(map[string][]byte, n)
	for i := range n {
		size := []int{0, 1, 100, 1000, 5000}[i%5]
		key := fmt.Sprintf("%sk%05d", prefix, i)
		values[key] = bytes.Repeat([]byte{byte('a' + i%26)}, size)
		s.put(key, values[key], 0)
	}
	return values
}

// sealed checks what etcd stores: every value is encrypted, and was changed at most so many times
// since it was created.
func (s *site) sealed(values map[string][]byte, versions int64) {
	s.t.Helper()
	kvs := all(s.t, s.kv)
	if len(kvs) != len(values) {
		s.t.Errorf("%d keys, want %d", len(kvs), len(values))
	}
	for _, kv := range kvs {
		if !bytes.HasPrefix(kv.Value, []byte(marker)) {
			s.t.Errorf("%s is not sealed", kv.Key)
		}
		if kv.Version > versions {
			s.t.Errorf("%s was written %d times, want %d", kv.Key, kv.Version, versions)
		}
	}
}

// opens checks that a proxy can read the values.
func (s *site) opens(p *harness.Proxy, values map[string][]byte) {
	s.t.Helper()
	for _, kv := range all(s.t, pb.NewKVClient(harness.Dial(s.t, p.Address, nil))) {
		if want, ok := values[string(kv.Key)]; !ok || !bytes.Equal(kv.Value, want) {
			s.t.Errorf("%s does not open to what was written (%d bytes, want %d)", kv.Key, len(kv.Value), len(want))
		}
	}
}

// waitOutput waits until a process has printed something.
func waitOutput(t testing.TB, p *harness.Process, what string) {
	t.Helper()
	harness.Eventually(t, within, "the output "+what, func() error {
		if strings.Contains(p.Log(), what) {
			return nil
		}
		if err := p.Alive(); err != nil {
			return err
		}
		return fmt.Errorf("not said")
	})
}

// changed counts the keys that were written a second time.
func (s *site) changed(ctx context.Context) int {
	r, err := s.kv.Range(ctx, &pb.RangeRequest{Key: []byte(prefix), RangeEnd: []byte("/sealed0")})
	if err != nil {
		return 0
	}
	n := 0
	for _, kv := range r.Kvs {
		if kv.Version > 1 {
			n++
		}
	}
	return n
}

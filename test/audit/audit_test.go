// Package audit tests the audit log of a real proxy in front of a real etcd.
package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const prefix = "/sealed/"

// verify runs `audit verify` and checks its exit code.
func verify(t *testing.T, want int, args ...string) string {
	t.Helper()
	cmd := exec.Command(harness.Bin(t, "etcd-kms-proxy"), append([]string{"audit", "verify"}, args...)...)
	out, err := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != want {
		t.Errorf("audit verify %v: exit code %d, %v, want %d\n%s", args, code, err, want, out)
	}
	return string(out)
}

// put writes a value, under the rule or outside it, and reads it back.
func put(t *testing.T, kv pb.KVClient, key, value string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
		return err
	}
	return get(t, kv, key, value)
}

func get(t *testing.T, kv pb.KVClient, key, value string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		return err
	}
	if len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value {
		t.Errorf("%s holds something else than what was put", key)
	}
	return nil
}

// TestNothingSecret checks that the audit log records writes, reads, a denied client, reloads, a
// crash and a restart, without a value or a key.
func TestNothingSecret(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{})
	ca := env.NewCA("clients")
	server := ca.Server("proxy")
	listener := harness.Listener{
		Address: harness.FreeAddress(t), AllowedClients: []string{"allowed"},
		TLS: &harness.ServerTLS{CertFile: server.CertFile, KeyFile: server.KeyFile, ClientCAFile: ca.File},
	}
	chainKey := env.Sealed.Key(99)
	path := filepath.Join(env.Dir, "audit.jsonl")
	p := env.StartProxy("proxy", harness.ProxyConfig{
		Listeners: []harness.Listener{listener}, Etcd: harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS: []harness.KMSConfig{env.LocalKey("dev", 2)}, Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev"}},
		Audit: &harness.Audit{Path: path, KeyFile: env.File("audit.key", chainKey), Required: true},
	})
	p.WaitReady(30 * time.Second)
	as := func(name string) pb.KVClient {
		return pb.NewKVClient(harness.Dial(t, p.Address, ca.ClientTLS(ca.Client(name, name))))
	}
	use := func(round string) {
		t.Helper()
		kv := as("allowed")
		for i := range 20 {
			if err := put(t, kv, fmt.Sprint(prefix, round, i), env.Sealed.Value(round)); err != nil {
				t.Fatal(err)
			}
			if err := put(t, kv, fmt.Sprint("/clear/", round, i), env.Clear.Value(round)); err != nil {
				t.Fatal(err)
			}
		}
	}
	use("one")
	if err := put(t, as("stranger"), prefix+"x", env.Sealed.Value("x")); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stranger: %v", err)
	}
	if err := syscall.Kill(p.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 10*time.Second, "the reload", func() error {
		if !strings.Contains(p.Log(), "configuration reloaded") {
			return fmt.Errorf("it is not in the log")
		}
		return p.Alive()
	})
	p.Kill()
	// Records from before a crash of the process must be in the log.
	last := read(t, path)
	if verify(t, 0, path, "--key-file", filepath.Join(env.Dir, "audit.key")); !bytes.Contains(last, []byte(`"event":"reload"`)) {
		t.Error("the reload was lost in the crash")
	}
	// Simulate a crash that cut a line short.
	if err := os.WriteFile(path, append(last, []byte(`{"seq":99,"time":"20`)...), 0o600); err != nil {
		t.Fatal(err)
	}
	p.Start()
	p.WaitReady(30 * time.Second)
	use("two")
	p.Stop(20 * time.Second)

	report := verify(t, 0, path, "--key-file", filepath.Join(env.Dir, "audit.key"))
	if !strings.Contains(report, "torn: a crash cut this line short") {
		t.Errorf("the torn line is not reported:\n%s", report)
	}
	count := map[string]int{}
	for line := range bytes.Lines(read(t, path)) {
		var r map[string]any
		if json.Unmarshal(line, &r) == nil {
			count[fmt.Sprint(r["event"], " ", r["client"], " ", r["outcome"])]++
		}
	}
	for _, want := range []string{"start <nil> <nil>", "kms <nil> <nil>", "denied stranger <nil>", "reload <nil> applied", "torn <nil> <nil>", "stop <nil> ok"} {
		if count[want] == 0 {
			t.Errorf("no record of %q in %v", want, count)
		}
	}
	for _, set := range []*canary.Set{env.Sealed, env.Clear} {
		if found, err := set.Files(path); err != nil || len(found) > 0 {
			t.Errorf("the log holds secrets: %v, %v", found, err)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

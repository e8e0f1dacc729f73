package audit

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestFullDisk fills the disk that the log is on. Without audit.required, the proxy refuses
// nothing. With it, the proxy refuses requests under the rule, and no others. Both recover when
// there is space again.
func TestFullDisk(t *testing.T) {
	for _, required := range []bool{false, true} {
		t.Run(fmt.Sprintf("required %v", required), func(t *testing.T) {
			env := harness.New(t)
			dir := filepath.Join(env.Dir, "full")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
				t.Skipf("only root can mount a small file system: %v", err)
			}
			t.Cleanup(func() {
				if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
			etcd := env.StartEtcd(harness.EtcdConfig{})
			path, ballast := filepath.Join(dir, "audit.jsonl"), filepath.Join(dir, "ballast")
			p := env.StartProxy("proxy", harness.ProxyConfig{
				Etcd: harness.Upstream{Endpoints: []string{etcd.URL}}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)},
				Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev"}}, Audit: &harness.Audit{Path: path, Required: required},
			})
			p.WaitReady(30 * time.Second)
			kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
			if err := put(t, kv, prefix+"a", env.Sealed.Value("a")); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err == nil {
				t.Fatal("the disk did not fill up")
			}
			harness.Eventually(t, 30*time.Second, "records to be lost", func() error {
				if err := syscall.Kill(p.PID(), syscall.SIGHUP); err != nil {
					return err
				}
				if !strings.Contains(p.Report(), "[-]audit: ") {
					return fmt.Errorf("/readyz does not say so")
				}
				return p.Alive()
			})
			code := codes.OK
			if required {
				code = codes.Unavailable
			}
			for what, err := range map[string]error{
				"put": put(t, kv, prefix+"b", env.Sealed.Value("b")), "get": get(t, kv, prefix+"a", env.Sealed.Value("a")),
			} {
				if status.Code(err) != code || required && !strings.Contains(err.Error(), "audit") {
					t.Errorf("%s under the rule: %v, want %v", what, err, code)
				}
			}
			if err := put(t, kv, "/clear/c", env.Clear.Value("c")); err != nil {
				t.Errorf("outside of the rule: %v", err)
			}
			if !strings.Contains(p.Scrape(), "etcd_kms_proxy_audit_writable 0") {
				t.Error("the metric does not say so")
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			p.WaitReady(30 * time.Second)
			if err := put(t, kv, prefix+"b", env.Sealed.Value("b")); err != nil {
				t.Error(err)
			}
			p.Stop(20 * time.Second)
			if report := verify(t, 0, path); !strings.Contains(report, "could not be written") {
				t.Errorf("the report does not say what was lost:\n%s", report)
			}
		})
	}
}

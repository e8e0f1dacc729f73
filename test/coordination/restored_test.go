package coordination

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestBypassAfterRestore checks that the watch for plaintext continues when etcd is restored with
// an older or empty data directory, and that writes from before the watch was back are found too.
func TestBypassAfterRestore(t *testing.T) {
	t.Parallel()
	for name, older := range map[string]bool{"emptied": false, "older": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.cfg.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "audit.jsonl")}
			past := func(key string) {
				t.Helper()
				if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + key), Value: []byte("in the clear")}); err != nil {
					t.Fatal(err)
				}
			}
			backup := filepath.Join(s.Dir, "backup")
			if older {
				if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte("/plain"), Value: []byte("in the backup")}); err != nil {
					t.Fatal(err)
				}
				s.etcd.Stop(within)
				if err := os.CopyFS(backup, os.DirFS(s.etcd.DataDir)); err != nil {
					t.Fatal(err)
				}
				s.etcd.Start()
			}
			p := s.StartProxy("proxy", s.cfg)
			p.WaitReady(within)
			s.agreed(t, prefix)
			past("before")
			s.seen(t, p, "before", 1)
			through := pb.NewKVClient(harness.Dial(t, p.Address, nil))
			for n := range 30 {
				if _, err := through.Put(t.Context(), &pb.PutRequest{Key: fmt.Appendf(nil, "%s%d", prefix, n), Value: []byte(s.Sealed.Value("a"))}); err != nil {
					t.Fatal(err)
				}
			}

			s.etcd.Stop(within)
			if err := os.RemoveAll(s.etcd.DataDir); err != nil {
				t.Fatal(err)
			}
			if older {
				if err := os.CopyFS(s.etcd.DataDir, os.DirFS(backup)); err != nil {
					t.Fatal(err)
				}
			}
			s.etcd.Start()
			past("at once")
			s.seen(t, p, "at once", 2)
			harness.Eventually(t, within, "the proxy to serve", func() error {
				_, err := through.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + "again"), Value: []byte(s.Sealed.Value("b"))})
				return err
			})
			past("after")
			s.seen(t, p, "after", 3)
			if !strings.Contains(p.Log(), "etcd has older data than before") {
				t.Error("the log does not tell of the restore")
			}
			s.agreed(t, prefix) // the record is in etcd again
		})
	}
}

// seen waits until the proxy has counted this many plaintext writes, and has the last one in its
// audit log.
func (s *site) seen(t *testing.T, p *harness.Proxy, key string, writes int) {
	t.Helper()
	harness.Eventually(t, within, "the write of "+key+" to be seen", func() error {
		metrics := p.Scrape()
		if line := fmt.Sprintf("etcd_kms_proxy_plaintext_writes_seen_total{rule=%q} %d\n", prefix, writes); !strings.Contains(metrics, line) {
			return fmt.Errorf("no %s", line)
		}
		if data, err := os.ReadFile(s.cfg.Audit.Path); err != nil || !strings.Contains(string(data), fmt.Sprintf("%q", prefix+key)) {
			return fmt.Errorf("it is not in the audit log: %w", err)
		}
		return nil
	})
}

// TestReencryptAfterRestore checks that restored values are re-encrypted at once and not at the end
// of the interval, even if the backup contains the announcement of the running proxy.
func TestReencryptAfterRestore(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cfg.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "audit.jsonl")}
	const key = prefix + "old"
	p := s.NewProxy("proxy", s.cfg)
	p.Args = []string{"--reencrypt"} // the interval
	p.Start()
	p.WaitReady(within)
	s.agreed(t, prefix)
	harness.Eventually(t, within, "the first run", func() error {
		if strings.Contains(p.Scrape(), "etcd_kms_proxy_reencrypt_timestamp_seconds 0\n") {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte("in the backup")}); err != nil {
		t.Fatal(err)
	}
	backup := filepath.Join(s.Dir, "backup")
	s.etcd.Stop(within)
	if err := os.CopyFS(backup, os.DirFS(s.etcd.DataDir)); err != nil {
		t.Fatal(err)
	}
	s.etcd.Start()
	through := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	for range 10 {
		harness.Eventually(t, within, "a put", func() error {
			_, err := through.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(s.Sealed.Value("new"))})
			return err
		})
	}
	// After the first stop, the proxy's watch is back, and has seen a later revision than the
	// backup has.
	if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + "last"), Value: []byte("in the clear")}); err != nil {
		t.Fatal(err)
	}
	s.seen(t, p, "last", 2)

	s.etcd.Stop(within)
	if err := os.RemoveAll(s.etcd.DataDir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(s.etcd.DataDir, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	s.etcd.Start()
	harness.Eventually(t, 2*within, "the value to be encrypted", func() error {
		if got := s.get(t, key); !strings.HasPrefix(got, "k8s:enc:kms:v2:") {
			return fmt.Errorf("it has %d bytes", len(got))
		}
		return nil
	})
}

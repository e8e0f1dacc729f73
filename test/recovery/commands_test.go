package recovery

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestCommandsAfterTheKeyIsDeleted checks that after the primary key was deleted, each command that
// decrypts values uses the recovery copies and records that, and that reencrypt moves everything to
// a new key, after which neither the old key nor a copy is used.
func TestCommandsAfterTheKeyIsDeleted(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	double := s.env.NewAlibaba()
	ack, dr, fresh := s.env.AlibabaKey("ack", double), s.env.LocalKey("dr", 1), s.env.LocalKey("new", 2)
	s.run(t, harness.Rule{WriteWith: "ack", Recovery: []string{"dr"}}, ack, dr)
	s.proxy.WaitReady(within)
	s.fill(t, "a", 40)
	config := s.proxy.ConfigFile
	if !s.proxy.Stop(within) {
		t.Fatal("the proxy does not end")
	}
	told := 0
	recorded := func(pair string) {
		t.Helper()
		n := s.recoveriesIn(t, s.commandsPath())[pair]
		if n <= told {
			t.Errorf("%s: %d records before, %d after", pair, told, n)
		}
		told = n
	}
	command := func(code int, config string, args ...string) string {
		t.Helper()
		out, got := s.env.Run(append(args, "--config", config)...)
		if got != code {
			t.Fatalf("%q: exit code %d, want %d: %s", args, got, code, out)
		}
		return out
	}
	command(0, config, "status")
	if n := s.recoveriesIn(t, s.commandsPath()); len(n) > 0 {
		t.Errorf("all is well, and the audit log tells of %v", n)
	}

	double.RemoveKey(kmsdouble.DefaultKeyID)
	command(1, config, "status")
	recorded("ack by dr")
	command(0, config, "verify")
	recorded("ack by dr")
	opened := filepath.Join(s.env.Dir, "opened")
	command(0, config, "decrypt", prefix+"a0", "--yes", "--output-file", opened)
	recorded("ack by dr")
	if value, err := os.ReadFile(opened); err != nil || string(value) != s.want[prefix+"a0"] {
		t.Errorf("decrypt wrote something else than was put: %v", err)
	}

	s.run(t, harness.Rule{WriteWith: "new", ReadWith: []string{"ack"}, Recovery: []string{"dr"}}, ack, dr, fresh)
	s.proxy.Stop(within) // reencrypt needs no proxy
	config = s.proxy.ConfigFile
	if out := command(0, config, "reencrypt"); !strings.Contains(out, "40 keys: 40 rewritten in ") {
		t.Errorf("reencrypt: %s", out)
	}
	recorded("ack by dr")
	for key := range s.want {
		if provider, by := s.copies(t, key); provider != "new" || !slices.Equal(by, []string{"dr"}) {
			t.Errorf("%s is sealed by %s with copies by %v", key, provider, by)
		}
	}
	// A deleted key is still a finding, as long as the configuration contains it.
	if out := command(1, config, "status"); !strings.Contains(out, "40    40       0") {
		t.Errorf("status: %s", out)
	}
	if n := s.recoveriesIn(t, s.commandsPath())["ack by dr"]; n != told {
		t.Errorf("everything is under the new key, and %d more seeds came from copies", n-told)
	}
	command(0, config, "reencrypt")
	if out, code := s.env.Run("audit", "verify", s.commandsPath()); code != 0 {
		t.Errorf("exit code %d: %s", code, out)
	}

	// The proxy starts with the new rules.
	s.proxy.Start()
	s.kv = pb.NewKVClient(harness.Dial(t, s.proxy.Address, nil))
	s.reads(t)
	s.fill(t, "b", 5)
	s.reads(t)
}

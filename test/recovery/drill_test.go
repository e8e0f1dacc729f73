package recovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// drillReport is the part of the JSON report of drill that tests read.
type drillReport struct {
	OK                                                     bool
	Etcd, Etcdutl                                          string
	Values, Readable, Missing, Unavailable, Untried, Bytes int64
	Snapshot                                               struct{ Revision int64 }
	Rules                                                  []struct {
		Groups []struct {
			Provider, KeyID string
			Values          int64
			Copies          map[string]int64
			Reasons         []struct {
				Text, Example string
				Values        int64
			}
		}
	}
	Left []struct {
		Name       string
		OK, Opened bool
	}
	Keys []struct{ Key string }
}

// drill runs the command with the programs of a version of etcd, checks its exit code, and that it
// leaves nothing in the folder of temporary files.
func (s *site) drill(t *testing.T, code int, config string, args ...string) (r drillReport, output string) {
	t.Helper()
	work := filepath.Join(s.env.Dir, "w")
	if err := os.MkdirAll(work, 0o700); err != nil {
		t.Fatal(err)
	}
	all := append([]string{"drill", "--config", config, "--output", "json", "--work-dir", work}, args...)
	if !slices.Contains(args, "--etcd") {
		all = append(all, "--etcd", harness.Bin(t, "etcd-3.7"), "--etcdutl", harness.Bin(t, "etcdutl-3.7"))
	}
	output = s.command(t, code, all...)
	if left, err := os.ReadDir(work); err != nil || len(left) > 0 {
		t.Errorf("%v, %v is left in the folder", err, left)
	}
	if at := strings.Index(output, "{\n"); at >= 0 {
		if err := json.NewDecoder(strings.NewReader(output[at:])).Decode(&r); err != nil {
			t.Fatalf("%v: %s", err, output)
		}
	}
	return r, output
}

// TestDrill rehearses the loss of a cloud key, from a live etcd and a snapshot. A recovery KMS is
// left, or an offline key, or neither, or a recovery KMS that does not respond. No call reaches the
// KMS that is treated as lost.
func TestDrill(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	double := s.env.NewAlibaba()
	safe, stranger := newOffline(t, s, "safe"), newOffline(t, s, "stranger")
	ack, dr, off := s.env.AlibabaKey("ack", double), s.env.LocalKey("dr", 1), offlineKMS(safe)
	s.run(t, harness.Rule{WriteWith: "ack"}, ack, dr, off)
	s.proxy.WaitReady(within)
	s.fill(t, "bare", 3)
	s.run(t, harness.Rule{WriteWith: "ack", Recovery: []string{"dr", "offline"}}, ack, dr, off)
	s.proxy.WaitReady(within)
	s.fill(t, "copied", 9)
	if !s.proxy.Stop(within) {
		t.Fatal("the proxy does not end")
	}
	config, calls := s.proxy.ConfigFile, func() (n int) {
		for _, action := range []string{"GenerateDataKey", "Encrypt", "Decrypt", "DescribeKey", "ListKeyVersions"} {
			n += double.Calls(action)
		}
		return n
	}
	called := calls()

	// Without a copy, values are missing. The metrics and the audit log say so.
	metrics := filepath.Join(s.env.Dir, "drill.prom")
	r, _ := s.drill(t, 1, config, "--metrics-file", metrics, "--list")
	if r.OK || r.Values != 12 || r.Readable != 9 || r.Missing != 3 || len(r.Keys) != 3 || !strings.HasPrefix(r.Keys[0].Key, prefix+"bare") {
		t.Errorf("%+v", r)
	}
	if got := metric(t, metrics, "etcd_kms_proxy_drill_success"); got != "0" {
		t.Errorf("success is %s", got)
	}
	if metric(t, metrics, "etcd_kms_proxy_drill_last_success_timestamp_seconds") != "" {
		t.Error("there was no success yet")
	}
	if n := calls(); n != called {
		t.Errorf("the KMS that is treated as lost was called %d times", n-called)
	}
	s.command(t, 0, "reencrypt", "--config", config)
	called = calls()
	before := s.everything(t)
	r, _ = s.drill(t, 0, config, "--metrics-file", metrics)
	if !r.OK || r.Readable != 12 || r.Etcd == "" || r.Etcdutl == "" || r.Snapshot.Revision == 0 || len(r.Rules) != 1 || len(r.Rules[0].Groups) != 1 {
		t.Fatalf("%+v", r)
	}
	if g := r.Rules[0].Groups[0]; g.Provider != "ack" || g.KeyID == "" || g.Copies["dr"] != 12 || g.Copies["offline"] != 12 {
		t.Errorf("%+v", g)
	}
	passed := metric(t, metrics, "etcd_kms_proxy_drill_last_success_timestamp_seconds")
	if passed == "" || metric(t, metrics, "etcd_kms_proxy_drill_success") != "1" ||
		metric(t, metrics, `etcd_kms_proxy_drill_values{result="readable",rule="/sealed/"}`) != "12" {
		t.Error("the metrics do not say that the drill passed")
	}

	if n := calls(); n != called {
		t.Errorf("the KMS that is treated as lost was called %d times", n-called)
	}
	// The identity alone, from a snapshot, and then without the file of the other recovery key.
	snapshot := s.etcd.Snapshot("saved.db")
	offline := []string{"--snapshot", snapshot, "--lost", "ack", "--lost", "dr"}
	r, _ = s.drill(t, 0, config, append(offline, "--identity", safe.file)...)
	if !r.OK || len(r.Left) != 1 || !r.Left[0].Opened {
		t.Errorf("%+v", r)
	}
	if out, _ := s.env.Run("status", "--config", config); !strings.Contains(out, "offline, last tested with an identity at 20") {
		t.Errorf("status does not say when the offline key was tested: %s", out)
	}
	called = calls()
	if err := os.Rename(dr.Local.KeyFile, dr.Local.KeyFile+".away"); err != nil {
		t.Fatal(err)
	}
	if r, _ = s.drill(t, 0, config, append(offline, "--identity", safe.file, "--sample", "4")...); r.Readable != 4 || r.Untried != 8 {
		t.Errorf("%+v", r)
	}
	for why, args := range map[string][]string{
		"take them with --identity":            offline,
		"made for other recipients":            append(slices.Clone(offline), "--identity", stranger.file),
		"its private keys are treated as lost": append(slices.Clone(offline), "--lost", "offline", "--identity", safe.file),
	} {
		if r, _ = s.drill(t, 1, config, append(args, "--metrics-file", metrics)...); r.Missing != 12 || len(r.Rules[0].Groups[0].Reasons) != 1 {
			t.Errorf("%s: %+v", why, r)
		} else if got := r.Rules[0].Groups[0].Reasons[0]; !strings.Contains(got.Text, why) || got.Values != 12 || strings.Contains(got.Text, got.Example) {
			t.Errorf("%s: the reason is %+v", why, got)
		}
		if metric(t, metrics, "etcd_kms_proxy_drill_last_success_timestamp_seconds") != passed || metric(t, metrics, "etcd_kms_proxy_drill_success") != "0" {
			t.Errorf("%s: the metrics do not say that the drill before passed, and this one failed", why)
		}
	}
	if _, out := s.drill(t, 3, config, "--snapshot", snapshot); !strings.Contains(out, "kms[1].local.keyFile") {
		t.Errorf("without the file of a key that is left: %s", out)
	}
	if n := calls(); n != called {
		t.Errorf("the KMS that is treated as lost was called %d times", n-called)
	}
	if after := s.everything(t); after != before {
		t.Errorf("etcd changed from %s to %s", before, after)
	}
	log, err := os.ReadFile(s.commandsPath())
	if err != nil || !strings.Contains(string(log), `"command":"drill"`) || !strings.Contains(string(log), `it unwrapped recovery copies`) {
		t.Errorf("the audit log has no drill: %v", err)
	}

	// A recovery KMS that does not respond says nothing about the values.
	s.run(t, harness.Rule{WriteWith: "ack", Recovery: []string{"dr"}}, ack, s.unreachable("dr"))
	s.proxy.Stop(within)
	if r, out := s.drill(t, 3, s.proxy.ConfigFile, "--timeout", "2s", "--snapshot", snapshot); r.OK || r.Unavailable != 12 || !strings.Contains(out, "does not respond") {
		t.Errorf("%+v", r)
	}
}

// everything returns what changes with any write to etcd: its revision and the hash of its keys.
func (s *site) everything(t *testing.T) string {
	t.Helper()
	r, err := pb.NewMaintenanceClient(harness.Dial(t, s.etcd.Address, nil)).HashKV(t.Context(), &pb.HashKVRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(r.Header.Revision, r.Hash)
}

// metric returns the value of a metric in a file, or "".
func metric(t *testing.T, file, name string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// TestDrillUsage checks the errors about the command line and the programs.
func TestDrillUsage(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	main, dr := s.env.LocalKey("main", 1), s.env.LocalKey("dr", 2)
	rules := func(rules ...harness.Rule) string {
		return s.env.NewProxy("usage", harness.ProxyConfig{Etcd: harness.Upstream{Endpoints: []string{s.etcd.URL}}, KMS: []harness.KMSConfig{main, dr}, Rules: rules}).ConfigFile
	}
	mutual := rules(harness.Rule{Prefix: "/a/", WriteWith: "main", Recovery: []string{"dr"}}, harness.Rule{Prefix: "/b/", WriteWith: "dr", Recovery: []string{"main"}})
	if _, out := s.drill(t, 2, mutual); !strings.Contains(out, "--lost") {
		t.Errorf("nothing is lost: %s", out)
	}
	if _, out := s.drill(t, 2, mutual, "--lost", "other"); !strings.Contains(out, "no such provider") {
		t.Error(out)
	}
	config := rules(harness.Rule{Prefix: prefix, WriteWith: "main", Recovery: []string{"dr"}})
	if _, out := s.drill(t, 3, config); !strings.Contains(out, "no value under a rule") {
		t.Error(out)
	}
	if _, out := s.drill(t, 3, config, "--etcd", filepath.Join(s.env.Dir, "none"), "--etcdutl", harness.Bin(t, "etcdutl-3.7")); !strings.Contains(out, "none") || !strings.Contains(out, "hint: ") {
		t.Error(out)
	}
	damaged := s.env.File("damaged.db", []byte(strings.Repeat("not a snapshot ", 1000)))
	if _, out := s.drill(t, 3, config, "--snapshot", damaged); !strings.Contains(out, "restore the snapshot: etcdutl-3.7: ") || !strings.Contains(out, "hint: ") {
		t.Error(out)
	}
	if _, out := s.drill(t, 3, config, "--snapshot", damaged+".none"); !strings.Contains(out, "damaged.db.none") || !strings.Contains(out, "hint: ") {
		t.Error(out)
	}
	if _, out := s.drill(t, 3, config, "--etcd", harness.Bin(t, "etcd-3.7"), "--etcdutl", "/bin/true"); !strings.Contains(out, "true made no data directory") {
		t.Error(out)
	}
	s.drillInRelativeFolder(t, config)
	if _, out := s.drill(t, 2, config, "--metrics-file", "drill.txt"); !strings.Contains(out, ".prom") {
		t.Error(out)
	}
	long := filepath.Join(s.env.Dir, strings.Repeat("d", 100))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, out := s.drill(t, 3, config, "--work-dir", long); !strings.Contains(out, "too long") || !strings.Contains(out, "--work-dir") {
		t.Error(out)
	}
}

// drillInRelativeFolder checks that a --work-dir next to the working directory is empty afterwards.
func (s *site) drillInRelativeFolder(t *testing.T, config string) {
	t.Helper()
	here, work := filepath.Join(s.env.Dir, "here"), filepath.Join(s.env.Dir, "next")
	for _, dir := range []string{here, work} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(harness.Bin(t, "etcd-kms-proxy"), "drill", "--config", config, "--work-dir", filepath.Join("..", "next"), "--etcd", harness.Bin(t, "etcd-3.7"), "--etcdutl", harness.Bin(t, "etcdutl-3.7"))
	cmd.Dir = here
	if out, _ := cmd.CombinedOutput(); !strings.Contains(string(out), "FAILED: there is no value under a rule") {
		t.Errorf("%s", out)
	}
	for _, dir := range []string{here, work} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%v, %v is left in %s", err, left, dir)
		}
	}
}

// TestDrillIsInterrupted sends SIGINT while the throw-away etcd runs: that ends, and its folder is
// removed.
func TestDrillIsInterrupted(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	main, dr := s.env.LocalKey("main", 1), s.env.LocalKey("dr", 2)
	s.run(t, harness.Rule{WriteWith: "main", Recovery: []string{"dr"}}, main, dr)
	s.proxy.WaitReady(within)
	s.fill(t, "a", 3)
	work, pid := filepath.Join(s.env.Dir, "w"), filepath.Join(s.env.Dir, "pid")
	if err := os.Mkdir(work, 0o700); err != nil {
		t.Fatal(err)
	}
	// an etcd that says which process it is, and does not respond: it listens on another socket
	slow := filepath.Join(s.env.Dir, "slow-etcd")
	script := fmt.Sprintf("#!/bin/sh\n[ \"$1\" = --version ] && exec %[1]s --version\necho $$ >%[2]s.new && mv %[2]s.new %[2]s\nexec %[1]s \"$@\" --listen-client-urls unix://other.sock:0\n", harness.Bin(t, "etcd-3.7"), pid)
	if err := os.WriteFile(slow, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(harness.Bin(t, "etcd-kms-proxy"), "drill", "--config", s.proxy.ConfigFile, "--work-dir", work, "--etcd", slow, "--etcdutl", harness.Bin(t, "etcdutl-3.7"))
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var etcd int
	harness.Eventually(t, within, "etcd to start", func() error {
		data, err := os.ReadFile(pid)
		if err == nil {
			_, err = fmt.Sscan(string(data), &etcd)
		}
		return err
	})
	harness.Eventually(t, within, "etcd to listen", func() error {
		if found, err := filepath.Glob(filepath.Join(work, "drill-*", "other.sock:0")); err != nil || len(found) == 0 {
			return fmt.Errorf("there is no socket, %w", err)
		}
		return nil
	})
	folders, err := os.ReadDir(work)
	if err != nil || len(folders) != 1 {
		t.Fatalf("%v, %v", folders, err)
	}
	if info, err := folders[0].Info(); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder has mode %v, %v", info.Mode(), err)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("it ends with %v", err)
	}
	if got := out.String(); got != "error: the drill was stopped: interrupt signal received\n" {
		t.Errorf("it says %q", got)
	}
	if err := syscall.Kill(etcd, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("etcd still runs: %v", err)
	}
	if left, err := os.ReadDir(work); err != nil || len(left) > 0 {
		t.Errorf("%v, %v is left", err, left)
	}
}

// TestDrillVersions restores snapshots of each version of etcd with the programs of each version
// that etcd supports for it: the same, and the next minor version.
func TestDrillVersions(t *testing.T) {
	t.Parallel()
	tools := map[string]string{"3.4": "etcdctl-3.5", "3.5": "etcdutl-3.5", "3.6": "etcdutl-3.6", "3.7": "etcdutl-3.7", "3.8": "etcdutl-3.7"}
	versions := harness.Versions(t)
	for i, from := range versions {
		t.Run(from, func(t *testing.T) {
			t.Parallel()
			s := &site{env: harness.New(t), want: map[string]string{}}
			s.etcd = s.env.StartEtcd(harness.EtcdConfig{Version: from})
			s.raw = pb.NewKVClient(harness.Dial(t, s.etcd.Address, nil))
			main, dr := s.env.LocalKey("main", 1), s.env.LocalKey("dr", 2)
			s.run(t, harness.Rule{WriteWith: "main", Recovery: []string{"dr"}}, main, dr)
			s.proxy.WaitReady(within)
			s.fill(t, "a", 5)
			s.proxy.Stop(within)
			for _, with := range versions[i:min(i+2, len(versions))] {
				r, _ := s.drill(t, 0, s.proxy.ConfigFile, "--etcd", harness.Bin(t, "etcd-"+with), "--etcdutl", harness.Bin(t, tools[with]))
				if r.Readable != 5 || !strings.HasPrefix(r.Etcd, with+".") {
					t.Errorf("a snapshot of %s with %s: %+v", from, with, r)
				}
			}
		})
	}
}

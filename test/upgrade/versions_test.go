package upgrade

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// before is the commit of the proxy that is upgraded, and to which the upgrade is rolled back.
// UPGRADE_FROM names another one.
const before = "1a46daf3310a9417c63f910ea70bbbce332a3c80"

// older builds the proxy of an earlier commit in the repository's history.
func older(t *testing.T) string {
	t.Helper()
	commit := os.Getenv("UPGRADE_FROM")
	if commit == "" {
		commit = before
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	git := func(args ...string) *exec.Cmd {
		return exec.Command("git", append([]string{"-C", root}, args...)...)
	}
	if out, err := git("cat-file", "-e", commit+"^{commit}").CombinedOutput(); err != nil {
		t.Skipf("the history does not hold %s (a shallow clone, or no clone at all), so there is no older proxy to upgrade from: %v %s", commit, err, out)
	}
	folder := t.TempDir()
	source, binary := filepath.Join(folder, "source"), filepath.Join(folder, "etcd-kms-proxy")
	if err := os.Mkdir(source, 0o700); err != nil {
		t.Fatal(err)
	}
	archive, err := git("archive", commit).Output()
	if err != nil {
		t.Fatalf("archive %s: %v", commit, err)
	}
	unpack := exec.Command("tar", "-x", "-C", source)
	unpack.Stdin = bytes.NewReader(archive)
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("unpack %s: %v\n%s", commit, err, out)
	}
	build := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "./cmd/etcd-kms-proxy")
	build.Dir, build.Env = source, append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", commit, err, out)
	}
	return binary
}

// TestUpgrade upgrades one of two proxies after the other under load, rolls one of them back, and
// upgrades it again. No request may fail and no event may be lost. Each version must read what the
// other one writes and accept its agreement, also at its own start.
func TestUpgrade(t *testing.T) {
	old, current := older(t), harness.Bin(t, "etcd-kms-proxy")
	e := harness.New(t)
	etcd := e.StartEtcd(harness.EtcdConfig{})
	kms, recovery := e.LocalKey("dev", 1), e.LocalKey("dr", 1)
	cfg := site(etcd, kms)
	cfg.KMS = append(cfg.KMS, recovery)
	cfg.Rules[0].Recovery, cfg.Rules[0].AllowPlaintextReads = []string{"dr"}, new(false)
	var proxies []*harness.Proxy
	for _, name := range []string{"proxy-1", "proxy-2"} {
		p := e.NewProxy(name, cfg)
		p.Binary = old
		p.Start()
		p.WaitReady(within)
		proxies = append(proxies, p)
	}
	// agreed asks each version whether the proxies have the same rules.
	agreed := func(state string) {
		t.Helper()
		for name, binary := range map[string]string{"the older": old, "this": current} {
			out, err := exec.Command(binary, "status", "--config", proxies[0].ConfigFile).CombinedOutput()
			if err != nil || strings.Count(string(out), "as here") != 2 || strings.Contains(string(out), "NOT as") {
				t.Errorf("%s: status of %s version: %v\n%s", state, name, err, out)
			}
		}
	}
	l := newLoad(t, e, proxies)
	l.during(client(t, etcd.URL), func() {
		l.proceed(500)
		agreed("before the upgrade")
		for _, step := range []struct {
			name   string
			proxy  int
			binary string
		}{
			{"one is upgraded", 0, current}, {"both are upgraded", 1, current}, {"one is rolled back", 0, old}, {"it is upgraded again", 0, current},
		} {
			for _, p := range proxies {
				l.connected(p)
			}
			l.proceed(500)
			p := proxies[step.proxy]
			if !p.Stop(within) {
				t.Errorf("%s: the proxy does not end", step.name)
			}
			p.Binary = step.binary
			p.Start()
			p.WaitReady(within)
			for _, p := range proxies {
				l.connected(p)
			}
			l.proceed(500)
			agreed(step.name)
		}
	})
}

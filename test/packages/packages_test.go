// Package packages installs what `make packages` builds.
package packages

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	configDir  = "/etc/etcd-kms-proxy"
	configFile = configDir + "/config.yaml"
	keyDir     = configDir + "/keys"
	keyFile    = keyDir + "/main.yaml"
	credential = "/run/credentials/etcd-kms-proxy.service/keys_main.yaml"
	user       = "etcd-kms-proxy"
)

// TestInstall installs, upgrades and removes two versions of the packages.
//
// It changes the machine, so it runs only with PACKAGES_INSTALL=1, as root.
func TestInstall(t *testing.T) {
	if os.Getenv("PACKAGES_INSTALL") != "1" {
		t.Skip("installs a package on this machine: set PACKAGES_INSTALL=1 where that is welcome")
	}
	if os.Geteuid() != 0 {
		t.Skip("dpkg and rpm need root")
	}
	old, next := build(t, "0.0.1"), build(t, "0.0.2")
	t.Run("deb", func(t *testing.T) { testDeb(t, only(t, old, "*.deb"), only(t, next, "*.deb")) })
	t.Run("rpm", func(t *testing.T) { testRPM(t, only(t, old, "*.rpm"), only(t, next, "*.rpm")) })
}

// testDeb installs the package on this machine, runs the proxy from it as its user, and upgrades,
// removes and purges it.
func testDeb(t *testing.T, old, next string) {
	if _, err := exec.LookPath("dpkg"); err != nil {
		t.Skip("no dpkg: not a Debian system")
	}
	if _, err := os.Stat(configDir); err == nil {
		t.Fatalf("%s exists: a package is installed already, or was not completely removed", configDir)
	}
	t.Cleanup(func() {
		_ = exec.Command("dpkg", "--purge", "etcd-kms-proxy").Run() // where the test ended early
		_ = os.RemoveAll(configDir)
	})

	must(t, "dpkg", "-i", old)
	for path, mode := range map[string]os.FileMode{
		"/usr/bin/etcd-kms-proxy":     0o755,
		configDir:                     0o750 | os.ModeDir,
		keyDir:                        0o700 | os.ModeDir,
		configFile:                    0o640,
		"/etc/default/etcd-kms-proxy": 0o600,
		"/usr/lib/systemd/system/etcd-kms-proxy.service":        0o644,
		"/usr/lib/systemd/system/etcd-kms-proxy.socket":         0o644,
		"/usr/share/man/man1/etcd-kms-proxy-serve.1.gz":         0o644,
		"/usr/share/bash-completion/completions/etcd-kms-proxy": 0o644,
		"/usr/share/doc/etcd-kms-proxy/copyright":               0o644,
		// named by hints
		"/usr/share/doc/etcd-kms-proxy/docs/reference/configuration.md": 0o644,
		"/usr/share/doc/etcd-kms-proxy/docs/guides/kubernetes.md":       0o644,
	} {
		if info, err := os.Stat(path); err != nil {
			t.Error(err)
		} else if info.Mode() != mode {
			t.Errorf("%s has mode %v, want %v", path, info.Mode(), mode)
		}
	}

	// As the comment in config.yaml says. The key is where the service alone finds it.
	if out, code := asUser(t, "config", "check"); code == 0 || !strings.Contains(out, credential) {
		t.Errorf("config check without a key: exit code %d, want one that is not 0, naming %s:\n%s", code, credential, out)
	}
	must(t, "etcd-kms-proxy", "kms", "new-local-key", keyFile)
	serves(t)

	// An upgrade keeps what the operator has changed.
	changed := append(read(t, configFile), "# changed by the operator\n"...)
	write(t, configFile, changed)
	key := read(t, keyFile)
	must(t, "dpkg", "--force-confold", "-i", next)
	if got := must(t, "etcd-kms-proxy", "version"); !strings.Contains(got, "0.0.2") {
		t.Errorf("after the upgrade the version is %q, want 0.0.2", got)
	}
	if !bytes.Equal(read(t, configFile), changed) {
		t.Error("the upgrade changed config.yaml")
	}

	// Nothing removes a key.
	must(t, "dpkg", "--remove", "etcd-kms-proxy")
	if _, err := os.Stat("/usr/bin/etcd-kms-proxy"); err == nil {
		t.Error("the binary is there after the removal")
	}
	if !bytes.Equal(read(t, configFile), changed) {
		t.Error("the removal changed config.yaml")
	}
	out := must(t, "dpkg", "--purge", "etcd-kms-proxy")
	if _, err := os.Stat(configFile); err == nil {
		t.Error("config.yaml is there after the purge")
	}
	if !bytes.Equal(read(t, keyFile), key) {
		t.Error("the purge changed the key")
	}
	if !strings.Contains(out, "left in place") {
		t.Errorf("the purge does not say that files are left:\n%s", out)
	}

	// Without a key, nothing is left.
	if err := os.RemoveAll(configDir); err != nil {
		t.Fatal(err)
	}
	must(t, "dpkg", "-i", next)
	out = must(t, "dpkg", "--purge", "etcd-kms-proxy")
	if _, err := os.Stat(configDir); err == nil || strings.Contains(out, "left in place") {
		t.Errorf("the purge of a package without keys leaves its folder, or says so (%v):\n%s", err, out)
	}
}

// serves runs the installed proxy, with its configuration, as its user, before a real etcd.
func serves(t *testing.T) {
	t.Helper()
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{Name: "etcd"})
	dir := t.TempDir()
	// the user must get at the socket
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	run := filepath.Join(dir, "run")
	if err := os.Mkdir(run, 0o755); err != nil {
		t.Fatal(err)
	}
	must(t, "chown", user+":", run)
	passed := filepath.Join(run, "keys_main.yaml") // as systemd passes a credential
	must(t, "install", "-m", "0400", "-o", user, keyFile, passed)
	text := string(read(t, configFile))
	for from, to := range map[string]string{
		"systemd://etcd":        "unix://" + run + "/etcd.sock",
		credential:              passed,
		"http://127.0.0.1:2379": etcd.URL,
		"127.0.0.1:9379":        fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t)),
	} {
		if !strings.Contains(text, from) {
			t.Fatalf("config.yaml of the package has no %s", from)
		}
		text = strings.ReplaceAll(text, from, to)
	}
	config := filepath.Join(dir, "config.yaml")
	write(t, config, []byte(text))
	must(t, "chmod", "0644", config)

	cmd := command("serve", "--config", config)
	log := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("serve: %v\n%s", err, log)
		}
	}()
	const key, value = "/registry/secrets/default/package", "kept-secret-by-the-package"
	etcdctl := harness.Bin(t, "etcdctl-3.7")
	harness.Eventually(t, 30*time.Second, "a put through the proxy", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, etcdctl, "--endpoints=unix://"+run+"/etcd.sock", "put", key, value).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if out := must(t, etcdctl, "--endpoints=unix://"+run+"/etcd.sock", "get", "--print-value-only", key); strings.TrimSpace(out) != value {
		t.Errorf("through the proxy the value is %q, want %q", out, value)
	}
	if out := must(t, etcdctl, "--endpoints="+etcd.URL, "get", "--print-value-only", key); !strings.HasPrefix(out, "k8s:enc:kms:v2:main:") {
		t.Error("etcd does not hold ciphertext")
	}
}

// TestReproducible builds the release twice.
func TestReproducible(t *testing.T) {
	first, second := sums(t, build(t, "0.0.1")), sums(t, build(t, "0.0.1"))
	for name, sum := range first {
		if second[name] != sum {
			t.Errorf("%s differs between two builds of one commit", name)
		}
	}
	for _, want := range []string{".deb", ".rpm", ".tar.gz", ".cdx.json"} {
		found := false
		for name := range first {
			found = found || strings.HasSuffix(name, want)
		}
		if !found {
			t.Errorf("no %s among %v", want, first)
		}
	}
}

func sums(t *testing.T, dir string) map[string][32]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string][32]byte)
	for _, e := range entries {
		all[e.Name()] = sha256.Sum256(read(t, filepath.Join(dir, e.Name())))
	}
	return all
}

// build makes the packages of a version for amd64 and returns their folder.
func build(t *testing.T, version string) string {
	t.Helper()
	dist := t.TempDir()
	cmd := exec.Command("sh", "deploy/packages/build.sh", version, "1700000000", harness.BinDir(t), dist, "amd64")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build.sh: %v\n%s", err, out)
	}
	return dist
}

// only returns the file in dir that matches pattern. There must be exactly one.
func only(t *testing.T, dir, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(files) != 1 {
		t.Fatalf("%s has the files %v (%v) that match %s, want one", dir, files, err, pattern)
	}
	return files[0]
}

// command is the installed proxy, run as its own user.
func command(args ...string) *exec.Cmd {
	return exec.Command("setpriv", append([]string{"--reuid", user, "--regid", user, "--clear-groups", "/usr/bin/etcd-kms-proxy"}, args...)...)
}

func asUser(t *testing.T, args ...string) (out string, code int) {
	t.Helper()
	cmd := command(args...)
	text, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return string(text), cmd.ProcessState.ExitCode()
}

func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	info, err := os.Stat(path)
	mode := os.FileMode(0o600)
	if err == nil {
		mode = info.Mode()
	}
	if err := os.WriteFile(path, data, mode); err != nil {
		t.Fatal(err)
	}
}

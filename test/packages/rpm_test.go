package packages

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// An rpmRoot is a file system with an empty rpm database. Its /usr has this machine's programs,
// which the package's scripts need; what rpm writes there goes into the folder added.
type rpmRoot struct {
	t          *testing.T
	dir, added string
}

// newRPMRoot makes the file system.
func newRPMRoot(t *testing.T) *rpmRoot {
	t.Helper()
	r := &rpmRoot{t, filepath.Join(t.TempDir(), "root"), filepath.Join(t.TempDir(), "added")}
	for _, dir := range []string{r.dir + "/etc", r.dir + "/usr", r.dir + "/dev", r.dir + "/proc", r.dir + "/tmp", r.added, r.added + "-work"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+link, filepath.Join(r.dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/sh\n", "group": "root:x:0:\n", "shadow": "root:*:19000:0:99999:7:::\n", "gshadow": "root:*::\n",
		"nsswitch.conf": "passwd: files\ngroup: files\n", "login.defs": "SYS_UID_MIN 100\nSYS_UID_MAX 999\nSYS_GID_MIN 100\nSYS_GID_MAX 999\n",
	} {
		if err := os.WriteFile(filepath.Join(r.dir, "etc", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// rpm and getent run as root, and the user of the package must be able to read these two.
	for _, name := range []string{"passwd", "group", "nsswitch.conf"} {
		if err := os.Chmod(filepath.Join(r.dir, "etc", name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// script runs a shell script in a mount namespace of its own, in which the file system is complete.
func (r *rpmRoot) script(script string, args ...string) (string, error) {
	mounts := `set -eu; root=$1 added=$2; shift 2
mount -t overlay -o "lowerdir=/usr,upperdir=$added,workdir=$added-work" usr "$root/usr"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
`
	out, err := exec.Command("unshare", append([]string{"--mount", "sh", "-c", mounts + script, "sh", r.dir, r.added}, args...)...).CombinedOutput()
	return string(out), err
}

// rpm runs rpm on the file system. Its database does not have the package shadow-utils, of which
// Debian has the same programs: so --nodeps.
func (r *rpmRoot) rpm(args ...string) string {
	r.t.Helper()
	out, err := r.script(`exec rpm --root "$root" --nodeps "$@"`, args...)
	if err != nil {
		r.t.Fatalf("rpm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// run runs an installed program as the package's user.
func (r *rpmRoot) run(args ...string) (string, error) {
	return r.script(`exec chroot "$root" setpriv --reuid `+user+` --regid `+user+` --clear-groups "$@"`, args...)
}

// path is the place of an installed file.
func (r *rpmRoot) path(name string) string {
	if below, ok := strings.CutPrefix(name, "/usr/"); ok {
		return filepath.Join(r.added, below)
	}
	return filepath.Join(r.dir, name)
}

// testRPM installs the package in an empty root with the rpm of this machine, and upgrades and
// erases it.
func testRPM(t *testing.T, old, next string) {
	if _, err := exec.LookPath("rpm"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("no rpm: install Debian's package rpm")
		}
		t.Skip("no rpm: install Debian's package rpm")
	}
	r := newRPMRoot(t)
	r.rpm("--install", old)
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
		"/usr/share/zsh/site-functions/_etcd-kms-proxy":         0o644,
		"/usr/share/doc/etcd-kms-proxy/copyright":               0o644,
	} {
		if info, err := os.Stat(r.path(path)); err != nil {
			t.Error(err)
		} else if info.Mode() != mode {
			t.Errorf("%s has mode %v, want %v", path, info.Mode(), mode)
		}
	}
	if out := r.rpm("--verify", "etcd-kms-proxy"); strings.TrimSpace(out) != "" {
		t.Errorf("rpm --verify finds differences:\n%s", out)
	}
	if passwd := string(read(t, r.path("/etc/passwd"))); !strings.Contains(passwd, user+":") {
		t.Errorf("the package did not make its user:\n%s", passwd)
	}

	// The user reads the configuration. It cannot read the key, which systemd passes to the
	// service.
	if out, err := r.run("/usr/bin/etcd-kms-proxy", "config", "check"); err == nil || !strings.Contains(out, credential) {
		t.Errorf("config check without a key: %v, want an error that names %s:\n%s", err, credential, out)
	}
	if out, err := r.script(`exec chroot "$root" etcd-kms-proxy kms new-local-key ` + keyFile); err != nil {
		t.Fatalf("new-local-key: %v\n%s", err, out)
	}
	key := read(t, r.path(keyFile))

	// An upgrade keeps what the operator has changed.
	changed := append(read(t, r.path(configFile)), "# changed by the operator\n"...)
	write(t, r.path(configFile), changed)
	r.rpm("--upgrade", next)
	if out, err := r.run("/usr/bin/etcd-kms-proxy", "version"); err != nil || !strings.Contains(out, "0.0.2") {
		t.Errorf("after the upgrade: %v, want version 0.0.2:\n%s", err, out)
	}
	if !bytes.Equal(read(t, r.path(configFile)), changed) {
		t.Error("the upgrade changed config.yaml")
	}

	// Nothing removes a key, and rpm keeps a changed configuration under another name.
	r.rpm("--erase", "etcd-kms-proxy")
	if _, err := os.Stat(r.path("/usr/bin/etcd-kms-proxy")); err == nil {
		t.Error("the binary is there after it was erased")
	}
	if !bytes.Equal(read(t, r.path(configFile+".rpmsave")), changed) {
		t.Error("config.yaml.rpmsave is not the changed configuration")
	}
	if !bytes.Equal(read(t, r.path(keyFile)), key) {
		t.Error("the key changed when the package was erased")
	}
}

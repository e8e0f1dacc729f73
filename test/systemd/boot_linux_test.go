package systemd

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// A booted machine has systemd as its first process, in namespaces of its own. Its /usr is this
// machine's, with changes kept apart; the rest of its file system is new.
type booted struct {
	t    *testing.T
	root string
	pid  int
}

// enterCgroup moves the first process into its cgroup, which becomes the root of its namespace of
// cgroups.
const enterCgroup = `set -eu
for procs; do echo 0 >"$procs"; done
exec unshare --cgroup /bin/sh -c "$script" machine "$root"
`

// firstProcess sets up the file system and becomes systemd. /proc/sys is read-only, so that systemd
// does not change the settings of the whole kernel.
const firstProcess = `set -eu
root=$1
hostname machine
ip link set lo up
mount --bind "$root" "$root"
mount -t overlay -o "lowerdir=/usr,upperdir=$root/.usr,workdir=$root/.work" usr "$root/usr"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
	mount -t cgroup2 cgroup "$root/sys/fs/cgroup"
else
	mount -t tmpfs -o mode=755 cgroup "$root/sys/fs/cgroup"
	mkdir "$root/sys/fs/cgroup/systemd"
	mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
fi
mount -t tmpfs -o mode=755 dev "$root/dev"
cd "$root/dev"
mknod -m 666 null c 1 3; mknod -m 666 zero c 1 5; mknod -m 666 full c 1 7
mknod -m 666 random c 1 8; mknod -m 666 urandom c 1 9; mknod -m 666 tty c 5 0
mkdir pts shm mqueue
mount -t devpts -o newinstance,ptmxmode=0666 devpts pts
ln -s pts/ptmx ptmx
ln -s /proc/self/fd fd
mount -t tmpfs -o mode=755 run "$root/run"
cd "$root"
mkdir .old
pivot_root . .old
umount -l /.old
rmdir /.old
mount --make-rshared / # as systemd needs it to pass credentials
export container=test PATH=/usr/sbin:/usr/bin
exec /lib/systemd/systemd --unit=multi-user.target --log-target=console --show-status=no
`

// boot starts a machine, which ends with the test.
func boot(t *testing.T) *booted {
	t.Helper()
	if os.Getenv("PACKAGES_INSTALL") != "1" || os.Geteuid() != 0 {
		t.Skip("boots systemd in namespaces of its own: set PACKAGES_INSTALL=1, as root, where that is welcome")
	}
	program(t, "systemctl")
	m := &booted{t: t, root: filepath.Join(t.TempDir(), "machine")}
	for _, dir := range []string{"dev", "etc/default", "etc/systemd/system", "proc", "root/deploy", "run", "sys", "tmp", "usr", ".usr", ".work", "var/lib", "var/log", "var/tmp"} {
		if err := os.MkdirAll(filepath.Join(m.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for path, to := range map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "var/run": "../run"} {
		if err := os.Symlink(to, filepath.Join(m.root, path)); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/sh\n", "group": "root:x:0:\n", "shadow": "root:*:19000:0:99999:7:::\n", "gshadow": "root:*::\n",
		"nsswitch.conf": "passwd: files\ngroup: files\n", "login.defs": "SYS_UID_MIN 100\nSYS_UID_MAX 999\nSYS_GID_MIN 100\nSYS_GID_MAX 999\n",
		"machine-id": strings.Repeat("1", 32) + "\n", "hosts": "127.0.0.1 localhost machine\n",
	} {
		m.file("/etc/"+name, text)
	}
	log, err := os.Create(filepath.Join(m.root, "boot.log"))
	if err != nil {
		t.Fatal(err)
	}
	cgroup := fmt.Sprintf("/ekp%d-systemd", os.Getpid())
	harness.NewCgroup(t, cgroup)
	args := []string{"-c", enterCgroup, "machine"}
	for _, hierarchy := range harness.Hierarchies(t) {
		args = append(args, filepath.Join(hierarchy, cgroup, "cgroup.procs"))
	}
	cmd := exec.Command("/bin/sh", args...)
	cmd.Env = append(os.Environ(), "script="+firstProcess, "root="+m.root)
	cmd.Stdout, cmd.Stderr = log, log
	stop, err := harness.StartInNamespaces(cmd)
	if err != nil {
		t.Skipf("namespaces cannot be made here: %v", err)
	}
	m.pid = cmd.Process.Pid
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := m.try(context.Background(), "systemctl status --no-pager --full 'etcd-kms-proxy*' systemd-journald; journalctl --no-pager -n 50")
			console, _ := os.ReadFile(log.Name())
			t.Logf("%s\n%s", out, console)
		}
		stop()
		log.Close()
	})
	harness.Eventually(t, time.Minute, "systemd to have booted", func() error {
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", m.pid)); err != nil || string(comm) != "systemd\n" {
			// whose root is still this machine's
			return fmt.Errorf("the first process is %q: %w", comm, err)
		}
		out, err := m.try(t.Context(), "systemctl is-system-running")
		if state := strings.TrimSpace(out); state != "running" && state != "degraded" {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return m
}

func (m *booted) file(path, text string) {
	m.t.Helper()
	if err := os.WriteFile(filepath.Join(m.root, path), []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// try runs a command line on the machine, in /root.
func (m *booted) try(ctx context.Context, line string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "--target", fmt.Sprint(m.pid), "--all", "--root", "--wd", "--", "/bin/sh", "-c", "cd /root; "+line)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin", "HOME=/root"}
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// run is try for what must succeed.
func (m *booted) run(line string) string {
	m.t.Helper()
	out, err := m.try(m.t.Context(), line)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return out
}

// page returns the commands and the first YAML block of a section of docs/deploy/systemd.md.
func page(t *testing.T, section string) (commands []string, block string) {
	t.Helper()
	data, err := os.ReadFile("../../docs/deploy/systemd.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(data), "\n## "+section+"\n")
	if !ok {
		t.Fatalf("the page has no section %s", section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	for line := range strings.Lines(text) {
		if command, ok := strings.CutPrefix(line, "    "); ok && !strings.HasPrefix(command, " ") {
			commands = append(commands, strings.TrimSpace(command))
		}
	}
	_, block, _ = strings.Cut(text, "```yaml\n")
	block, _, _ = strings.Cut(block, "```")
	return commands, block
}

// TestBooted follows the section "Install" of docs/deploy/systemd.md on a machine that systemd has
// booted. Then the service is restarted, killed and stopped by a debugger while a client writes.
func TestBooted(t *testing.T) {
	m := boot(t)
	for name, tool := range map[string]string{"root/etcd-kms-proxy": "etcd-kms-proxy", "root/etcd": "etcd-3.7", "root/etcdctl": "etcdctl-3.7"} {
		data, err := os.ReadFile(harness.Bin(t, tool))
		if err == nil {
			err = os.WriteFile(filepath.Join(m.root, name), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(filepath.Join(m.root, "root/deploy/systemd"), os.DirFS("../../deploy/systemd")); err != nil {
		t.Fatal(err)
	}
	m.run("systemd-run --unit=etcd /root/etcd --data-dir /root/etcd-data --log-level error")
	commands, block := page(t, "Install")
	var config map[string]any
	if err := yaml.Unmarshal([]byte(block), &config); err != nil || len(commands) != 10 {
		t.Fatalf("the page has %d commands, and its configuration is not YAML: %v", len(commands), err)
	}
	// the only change
	config["etcd"] = map[string]any{"endpoints": []string{"http://127.0.0.1:2379"}}
	text, err := yaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range commands {
		if strings.HasPrefix(line, "systemctl enable") {
			m.file("/etc/etcd-kms-proxy/config.yaml", string(text))
		}
		t.Logf("%s\n%s", line, m.run(line))
	}
	const through = "/root/etcdctl --endpoints=unix:///run/etcd-kms-proxy/etcd.sock "
	m.run(through + "put /registry/secrets/default/a value-of-a-secret")
	if out := m.run(through + "get --print-value-only /registry/secrets/default/a"); strings.TrimSpace(out) != "value-of-a-secret" {
		t.Errorf("through the socket: %q", out)
	}
	if out := m.run("/root/etcdctl get --print-value-only /registry/secrets/default/a"); !strings.HasPrefix(out, "k8s:enc:kms:v2:main:") {
		t.Error("etcd does not hold ciphertext")
	}
	if out := m.run("ls -l /run/credentials/etcd-kms-proxy.service/"); !strings.Contains(out, "keys_main.yaml") {
		t.Errorf("the credentials are %s", out)
	}
	if out := m.run("systemd-analyze security --no-pager etcd-kms-proxy.service | tail -n 1"); !strings.Contains(out, "OK") {
		t.Errorf("the exposure is %s", out)
	}

	// The key gets a new version, which the service has after a restart. No write fails.
	var writes, failed atomic.Int32
	var first atomic.Pointer[string]
	ctx, end := context.WithCancel(t.Context())
	defer end()
	var writer sync.WaitGroup
	writer.Go(func() {
		for ctx.Err() == nil {
			if out, err := m.try(context.Background(), through+"put /registry/secrets/default/b "+fmt.Sprint(writes.Load())); err != nil {
				failed.Add(1)
				first.CompareAndSwap(nil, &out)
			}
			writes.Add(1)
		}
	})
	m.run("etcd-kms-proxy kms new-local-key /etc/etcd-kms-proxy/keys/main.yaml")
	for range 3 {
		m.run("systemctl restart etcd-kms-proxy.service")
	}
	m.run("systemctl reload etcd-kms-proxy.service")
	m.run("etcd-kms-proxy reencrypt")
	m.run("etcd-kms-proxy status") // 0: all values are encrypted with the new version
	end()
	writer.Wait()
	if first.Load() != nil {
		t.Errorf("%d of %d writes failed while the service restarted, the first with %s", failed.Load(), writes.Load(), *first.Load())
	}

	// systemd restarts a process that has died, and one that has not reported for the time of the
	// watchdog.
	restarts := func(signal string, want int) {
		t.Helper()
		m.run("kill -" + signal + " $(systemctl show -p MainPID --value etcd-kms-proxy.service)")
		harness.Eventually(t, time.Minute, "a restart after SIG"+signal, func() error {
			out, err := m.try(t.Context(), "systemctl show -p NRestarts --value etcd-kms-proxy.service; systemctl is-active etcd-kms-proxy.service")
			if out != fmt.Sprintf("%d\nactive\n", want) {
				return fmt.Errorf("%q: %w", out, err)
			}
			return nil
		})
		m.run(through + "get /registry/secrets/default/a")
	}
	restarts("KILL", 1)
	restarts("STOP", 2)

	// The folder of the socket stays, for static Pods that have mounted it.
	inode := m.run("stat -c %i /run/etcd-kms-proxy")
	m.run("systemctl stop etcd-kms-proxy.socket etcd-kms-proxy.service")
	m.run("systemctl start etcd-kms-proxy.socket etcd-kms-proxy.service")
	if after := m.run("stat -c %i /run/etcd-kms-proxy"); after != inode {
		t.Errorf("the folder of the socket was replaced: inode %s, then %s", inode, after)
	}
	if out := m.run("journalctl --no-pager -u etcd-kms-proxy.service"); bytes.Contains([]byte(out), []byte("value-of-a-secret")) {
		t.Error("the journal holds a secret")
	}
}

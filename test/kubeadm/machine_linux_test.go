package kubeadm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// A machine is a host for one kubelet: a folder that is the root of its file system, and namespaces
// of its own for mounts, processes, the network and the host name. Its first process starts
// containerd, and kubelet as soon as kubeadm has configured it, as systemd does on a real node.
type machine struct {
	t       *testing.T
	name    string
	address string // of its network interface
	root    string
	pid     int // of its first process
	cgroup  string
}

// network is an Ethernet switch in a network namespace. The test process is at its first address.
type network struct {
	t    *testing.T
	name string
	used int
}

const (
	subnet       = "10.231.77."
	hostAddress  = subnet + "1"
	machineFiles = "/opt/machine" // programs of a machine, the only folder of its PATH
	machinePath  = "PATH=" + machineFiles
)

// newNetwork makes a network, which is removed with the test.
func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{t: t, name: fmt.Sprintf("ekp%d", os.Getpid()), used: 1}
	n.ip("netns", "add", n.name)
	t.Cleanup(func() { n.ip("netns", "delete", n.name) }) // the interfaces go with it
	n.inside("link", "set", "lo", "up")
	n.inside("link", "add", "switch", "type", "bridge")
	n.inside("link", "set", "switch", "up")
	host := n.name + "h"
	n.ip("link", "add", host, "type", "veth", "peer", "name", "port1", "netns", n.name)
	n.inside("link", "set", "port1", "master", "switch", "up")
	n.ip("address", "add", hostAddress+"/24", "dev", host)
	n.ip("link", "set", host, "up")
	return n
}

// plug connects the network namespace of a process, and returns its address.
func (n *network) plug(pid int) string {
	n.t.Helper()
	n.used++
	port, address := fmt.Sprint("port", n.used), fmt.Sprint(subnet, n.used)
	n.inside("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(pid))
	n.inside("link", "set", port, "master", "switch", "up")
	inside := func(args ...string) {
		n.must("nsenter", append([]string{"--target", fmt.Sprint(pid), "--net", "ip"}, args...)...)
	}
	inside("link", "set", "lo", "up")
	inside("address", "add", address+"/24", "dev", "eth0")
	inside("link", "set", "eth0", "up")
	inside("route", "add", "default", "via", hostAddress)
	return address
}

func (n *network) ip(args ...string) { n.t.Helper(); n.must("ip", args...) }

func (n *network) inside(args ...string) {
	n.t.Helper()
	n.ip(append([]string{"-netns", n.name}, args...)...)
}

func (n *network) must(name string, args ...string) {
	n.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		n.t.Errorf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// kernelSettings are those that kubelet changes for the whole kernel.
var kernelSettings = []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"}

// keepKernelSettings restores them after the test.
func keepKernelSettings(t *testing.T) {
	t.Helper()
	for _, name := range kernelSettings {
		path := "/proc/sys/" + name
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.WriteFile(path, before, 0o600); err != nil {
				t.Error(err)
			}
		})
	}
}

// firstProcess is the script of a machine's first process. After the file system is set up it
// starts containerd, and starts kubelet again whenever it ends, with the flags of kubeadm's systemd
// unit.
const firstProcess = `set -eu
root=$1 name=$2 cgroup=$3
hostname "$name"
mount --bind "$root" "$root"
mount --bind /usr "$root/usr"
mount -o remount,bind,ro "$root/usr"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=755 run "$root/run"
cd "$root"
mkdir -p .old
pivot_root . .old
umount -l /.old
rmdir /.old
export PATH=` + machineFiles + `
until [ -e /plugged ]; do sleep 0.1; done
echo 1 >/proc/sys/net/ipv4/ip_forward
containerd --config /etc/containerd.toml >>/var/log/containerd.log 2>&1 &
while sleep 0.5; do
	[ -e /var/lib/kubelet/config.yaml ] || continue
	KUBELET_KUBEADM_ARGS=
	[ ! -e /var/lib/kubelet/kubeadm-flags.env ] || . /var/lib/kubelet/kubeadm-flags.env
	kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \
		--config=/var/lib/kubelet/config.yaml --cgroup-root="$cgroup" $KUBELET_KUBEADM_ARGS >>/var/log/kubelet.log 2>&1 || true
done
`

const containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "%s"
# A test process without CAP_SYS_RESOURCE may not protect the containers from the OOM killer.
restrict_oom_score_adj = true
`

// hostPrograms are the programs of this machine that kubeadm, kubelet, containerd and the script of
// the first process run. systemctl is not among them, so that kubeadm does not expect systemd.
var hostPrograms = []string{
	"sh", "sleep", "mkdir", "rmdir", "cat", "cp", "mount", "umount", "losetup", "blkid", "iptables", "iptables-save", "iptables-restore", "ip", "tc",
	"containerd", "containerd-shim-runc-v2", "runc", "ctr",
}

// needMachines skips the test unless it was asked for and can run here.
func needMachines(t *testing.T) {
	t.Helper()
	if os.Getenv("KUBEADM_INIT") == "" {
		t.Skip("takes minutes and needs kubelet and a container runtime: make kubeadm-test runs it")
	}
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, for namespaces")
	}
	for _, name := range append(hostPrograms, "nsenter", "pivot_root") {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%v: install Debian's packages containerd, runc, iptables, iproute2 and util-linux", err)
		}
	}
}

// newMachine starts a machine with nothing on it but containerd.
func (n *network) newMachine(env *harness.Env, name string) *machine {
	t := n.t
	t.Helper()
	m := &machine{t: t, name: name, root: filepath.Join(env.Dir, name), cgroup: "/" + n.name + "-" + name}
	for _, dir := range []string{
		"dev", "etc/kubernetes", "etc/cni/net.d", "opt/cni/bin", "opt/machine", "proc", "run", "sys", "tmp", "usr",
		"var/lib/kubelet", "var/lib/containerd", "var/lib/etcd", "var/log/pods", "var/log/containers",
	} {
		if err := os.MkdirAll(filepath.Join(m.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} {
		m.link("usr/"+link, "/"+link)
	}
	m.link("../run", "/var/run")
	for _, program := range hostPrograms {
		path, err := exec.LookPath(program)
		if err != nil {
			t.Fatal(err)
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			t.Fatal(err)
		}
		if filepath.Base(path) == "xtables-nft-multi" || filepath.Base(path) == "xtables-legacy-multi" {
			path = "/usr/sbin/" + program // it looks at its own name
			path = strings.Replace(path, "iptables", "iptables-nft", 1)
		}
		m.link(path, machineFiles+"/"+program)
	}
	for program, tool := range map[string]string{"kubeadm": "kubeadm", "kubelet": "kubelet", "kubectl": "kubectl", "etcdctl": "etcdctl-3.7", "etcd-kms-proxy": "etcd-kms-proxy"} {
		install(t, harness.Bin(t, tool), filepath.Join(m.root, machineFiles, program))
	}
	m.file("/etc/hosts", "127.0.0.1 localhost "+name+"\n")
	m.file("/etc/machine-id", fmt.Sprintf("%032x\n", m.cgroup))
	m.file("/etc/resolv.conf", "nameserver "+hostAddress+"\n")
	m.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
	m.file("/etc/group", "root:x:0:\n")
	m.file("/etc/containerd.toml", fmt.Sprintf(containerdConfig, pauseImage(t)))
	harness.NewCgroup(t, m.cgroup)
	m.start()
	m.address = n.plug(m.pid)
	m.file("/plugged", "")
	m.waitContainerd()
	return m
}

func (m *machine) link(to, path string) {
	m.t.Helper()
	if err := os.Symlink(to, filepath.Join(m.root, path)); err != nil {
		m.t.Fatal(err)
	}
}

// file writes a file of the machine.
func (m *machine) file(path, text string) {
	m.t.Helper()
	if err := os.WriteFile(filepath.Join(m.root, path), []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// start starts the first process. All others end with it.
func (m *machine) start() {
	m.t.Helper()
	log, err := os.Create(filepath.Join(m.root, "var/log/machine.log"))
	if err != nil {
		m.t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", firstProcess, "machine", m.root, m.name, m.cgroup)
	cmd.Stdout, cmd.Stderr = log, log
	stop, err := harness.StartInNamespaces(cmd)
	if err != nil {
		m.t.Fatalf("start machine %s: %v", m.name, err)
	}
	log.Close()
	m.pid = cmd.Process.Pid
	m.t.Cleanup(stop)
}

// command is a program on the machine.
func (m *machine) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", fmt.Sprint(m.pid), "--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd", "--", machineFiles + "/" + args[0],
	}, args[1:]...)...)
	cmd.Env = []string{machinePath, "HOME=/root"}
	cmd.WaitDelay = time.Second
	return cmd
}

// run runs a program on the machine, and returns what it prints.
func (m *machine) run(args ...string) string {
	m.t.Helper()
	begin := time.Now()
	out, err := m.command(m.t.Context(), args...).CombinedOutput()
	m.t.Logf("%s: %s (%v)\n%s", m.name, strings.Join(args, " "), time.Since(begin).Round(100*time.Millisecond), out)
	if err != nil {
		m.t.Fatalf("%s: %s: %v\n%s", m.name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (m *machine) waitContainerd() {
	m.t.Helper()
	harness.Eventually(m.t, within, "containerd to be ready", func() error {
		out, err := m.command(m.t.Context(), "ctr", "version").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// Package kubeadm runs the commands of a control-plane node on what a real kubeadm has written,
// with a real etcd and a real kube-apiserver.
package kubeadm

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	proxyImage = "registry.example.com/etcd-kms-proxy:test"
	within     = 2 * time.Minute
	manifest   = "/etc/kubernetes/manifests/kube-apiserver.yaml"
	podFile    = "/etc/kubernetes/manifests/etcd-kms-proxy.yaml"
	configFile = "/etc/etcd-kms-proxy/config.yaml"
)

const kubernetesVersion = "v1.37.2"

// node is a control-plane node. Its folder is the root of all its programs.
type node struct {
	t             *testing.T
	env           *harness.Env
	root          string
	runner        *runner  // in place of kubelet
	machine       *machine // nil with a runner
	listen, admin string
	etcd          string // host:port
	client        *kubernetes.Clientset
}

// newNode has kubeadm write certificates and manifests, and starts etcd and the API server. stuck
// may be nil.
func newNode(t *testing.T, stuck func(*core.Pod) bool) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("this test needs root, for chroot")
		}
		t.Skip("this test needs root, for chroot")
	}
	env := harness.New(t)
	n := &node{t: t, env: env, root: filepath.Join(env.Dir, "node"), listen: harness.FreeAddress(t), admin: harness.FreeAddress(t), etcd: harness.FreeAddress(t)}
	for _, dir := range []string{"etc/kubernetes", "tmp", "usr/local/bin", "var/lib", "var/log", "var/run"} {
		if err := os.MkdirAll(filepath.Join(n.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, tool := range map[string]string{"etcd": "etcd-3.7", "kube-apiserver": "kube-apiserver", "etcd-kms-proxy": "etcd-kms-proxy"} {
		install(t, harness.Bin(t, tool), filepath.Join(n.root, "usr/local/bin", name))
	}
	n.file("/etc/hosts", "127.0.0.1 localhost\n")
	peer, port := "https://"+harness.FreeAddress(t), harness.FreePort(t)
	n.file("/kubeadm.yaml", fmt.Sprintf(`apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: 192.0.2.10, bindPort: %d}
nodeRegistration: {name: node-1, criSocket: unix:///run/containerd/containerd.sock}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: %[5]s
etcd:
  local:
    extraArgs:
    - {name: listen-client-urls, value: "https://%[2]s"}
    - {name: advertise-client-urls, value: "https://%[2]s"}
    - {name: listen-peer-urls, value: "%[3]s"}
    - {name: initial-advertise-peer-urls, value: "%[3]s"}
    - {name: initial-cluster, value: "node-1=%[3]s"}
    - {name: listen-metrics-urls, value: "http://%[4]s"}
    - {name: unsafe-no-fsync, value: "true"}
apiServer:
  extraArgs:
  - {name: bind-address, value: 127.0.0.1}
  - {name: etcd-servers, value: "https://%[2]s"}
`, port, n.etcd, peer, harness.FreeAddress(t), kubernetesVersion))
	for _, phase := range []string{"certs all", "kubeconfig super-admin", "etcd local", "control-plane apiserver"} {
		args := append([]string{"init", "phase"}, strings.Fields(phase)...)
		if out, err := exec.Command(harness.Bin(t, "kubeadm"), append(args, "--config", "/kubeadm.yaml", "--rootfs", n.root)...).CombinedOutput(); err != nil {
			t.Fatalf("kubeadm %s: %v\n%s", phase, err, out)
		}
	}
	n.runner = &runner{root: n.root, stuck: stuck, images: map[string]bool{proxyImage: true}}
	for _, name := range []string{"etcd", "kube-apiserver"} {
		for _, line := range strings.Split(string(n.read("/etc/kubernetes/manifests/"+name+".yaml")), "\n") {
			if image, ok := strings.CutPrefix(strings.TrimSpace(line), "image: "); ok {
				n.runner.images[image] = true
			}
		}
	}
	n.runner.start()
	t.Cleanup(n.finish)
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(n.root, "etc/kubernetes/super-admin.conf"))
	if err != nil {
		t.Fatal(err)
	}
	config.Host, config.QPS, config.Timeout = fmt.Sprintf("https://127.0.0.1:%d", port), -1, 20*time.Second
	config.ServerName = "kubernetes"
	if n.client, err = kubernetes.NewForConfig(rest.CopyConfig(config)); err != nil {
		t.Fatal(err)
	}
	n.waitReady()
	return n
}

// finish stops the node, and searches its logs for secrets.
func (n *node) finish() {
	n.runner.end()
	logs := filepath.Join(n.root, "var/log")
	found, err := n.env.Sealed.Files(logs)
	if err != nil {
		n.t.Error(err)
	}
	for _, f := range found {
		n.t.Errorf("a secret stands in a log: %v", f)
	}
	for _, p := range n.runner.problems {
		n.t.Errorf("kubelet would have refused: %s", p)
	}
	if n.t.Failed() {
		files, _ := filepath.Glob(logs + "/*.log")
		for _, f := range files {
			data, _ := os.ReadFile(f)
			n.t.Logf("--- end of %s\n%s", filepath.Base(f), data[max(0, len(data)-4<<10):])
		}
	}
}

// install links a program into the node, or copies it from another file system.
func install(t *testing.T, from, to string) {
	t.Helper()
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		t.Fatal(err)
	}
	if os.Link(from, to) == nil {
		return
	}
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
}

// file writes a file of the node.
func (n *node) file(path, text string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.root, path), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// read reads a file of the node; nil if it is not there.
func (n *node) read(path string) []byte {
	n.t.Helper()
	data, err := os.ReadFile(filepath.Join(n.root, path))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	return data
}

// command is one of the proxy's commands on the node.
func (n *node) command(args ...string) (*exec.Cmd, *bytes.Buffer) {
	var cmd *exec.Cmd
	if n.machine != nil {
		cmd = n.machine.command(n.t.Context(), append([]string{"etcd-kms-proxy"}, args...)...)
	} else {
		cmd = n.chrooted(args)
	}
	out := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	return cmd, out
}

func (n *node) chrooted(args []string) *exec.Cmd {
	return &exec.Cmd{
		Path: "/usr/local/bin/etcd-kms-proxy", Args: append([]string{"etcd-kms-proxy"}, args...), Dir: "/", Env: []string{"PATH=/usr/local/bin"},
		SysProcAttr: &syscall.SysProcAttr{Chroot: n.root},
	}
}

// run runs a command, and checks its exit code and that its output holds want.
func (n *node) run(code int, want string, args ...string) string {
	n.t.Helper()
	cmd, out := n.command(args...)
	begin := time.Now()
	err := cmd.Run()
	n.t.Logf("%s (%v)\n%s", strings.Join(args, " "), time.Since(begin).Round(time.Millisecond), out)
	if cmd.ProcessState == nil {
		n.t.Fatalf("%q: %v", args, err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code || !strings.Contains(out.String(), want) {
		n.t.Fatalf("%q: exit code %d, want %d and %q:\n%s", args, got, code, want, out)
	}
	return out.String()
}

// enable are the arguments of kubeadm enable for this node.
func (n *node) enable(args ...string) []string {
	return append([]string{"kubeadm", "enable", "--image", proxyImage, "--listen", n.listen, "--admin", n.admin, "--timeout", "90s"}, args...)
}

const keyFile = "/etc/etcd-kms-proxy/key.yaml"

func (n *node) waitReady() {
	n.t.Helper()
	harness.Eventually(n.t, within, "the API server to be ready", func() error {
		ctx, cancel := context.WithTimeout(n.t.Context(), 5*time.Second)
		defer cancel()
		_, err := n.client.RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err == nil {
			_, err = n.client.CoreV1().Namespaces().Get(ctx, "default", meta.GetOptions{})
		}
		return err
	})
}

// create creates a Secret.
func (n *node) create(name, value string) {
	n.t.Helper()
	n.createLabelled(name, value, nil)
}

func (n *node) createLabelled(name, value string, labels map[string]string) {
	n.t.Helper()
	_, err := n.client.CoreV1().Secrets("default").Create(n.t.Context(), &core.Secret{
		ObjectMeta: meta.ObjectMeta{Name: name, Labels: labels}, Data: map[string][]byte{"value": []byte(value)},
	}, meta.CreateOptions{})
	if err != nil {
		n.t.Fatalf("create Secret %s: %v", name, err)
	}
}

// check reads a Secret through the API server.
func (n *node) check(name, value string) {
	n.t.Helper()
	s, err := n.client.CoreV1().Secrets("default").Get(n.t.Context(), name, meta.GetOptions{})
	if err != nil || string(s.Data["value"]) != value {
		n.t.Errorf("Secret %s: %q, %v", name, s.Data["value"], err)
	}
}

// stored counts the Secrets in etcd that are encrypted, and those that are not.
func (n *node) stored() (encrypted, plaintext int) {
	n.t.Helper()
	pki := filepath.Join(n.root, "etc/kubernetes/pki")
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(n.read("/etc/kubernetes/pki/etcd/ca.crt"))
	pair, err := tls.LoadX509KeyPair(filepath.Join(pki, "apiserver-etcd-client.crt"), filepath.Join(pki, "apiserver-etcd-client.key"))
	if err != nil {
		n.t.Fatal(err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{pair}}
	conn := harness.Dial(n.t, n.etcd, config)
	defer conn.Close()
	r, err := pb.NewKVClient(conn).Range(n.t.Context(), &pb.RangeRequest{Key: []byte("/registry/secrets/"), RangeEnd: []byte("/registry/secrets0")})
	if err != nil {
		n.t.Fatal(err)
	}
	for _, kv := range r.Kvs {
		if bytes.HasPrefix(kv.Value, []byte("k8s:enc:kms:v2:main:")) {
			encrypted++
		} else {
			plaintext++
		}
	}
	return encrypted, plaintext
}

// wantStored checks the counts of stored.
func (n *node) wantStored(encrypted, plaintext int) {
	n.t.Helper()
	if e, p := n.stored(); e != encrypted || p != plaintext {
		n.t.Errorf("etcd holds %d encrypted Secrets and %d others, want %d and %d", e, p, encrypted, plaintext)
	}
}

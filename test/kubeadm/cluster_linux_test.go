package kubeadm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	endpoint = hostAddress + ":6443" // of the load balancer
	token    = "abcdef.0123456789abcdef"
	// noDowntime bounds the time without an answer through the load balancer, while one API server
	// after the other restarts on a busy machine. A restart of an API server takes longer.
	noDowntime = 20 * time.Second
)

// kubeadmJoin has a machine become one more control-plane node.
func (m *machine) kubeadmJoin(env *harness.Env, images, certificateKey string) *node {
	m.t.Helper()
	m.importImages(images)
	m.file("/kubeadm.yaml", fmt.Sprintf(`apiVersion: kubeadm.k8s.io/v1beta4
kind: JoinConfiguration
discovery:
  bootstrapToken: {apiServerEndpoint: "%[1]s", token: %[2]s, unsafeSkipCAVerification: true}
controlPlane:
  certificateKey: %[3]s
  localAPIEndpoint: {advertiseAddress: %[4]s, bindPort: 6443}
nodeRegistration:
  name: %[5]s
  criSocket: unix:///run/containerd/containerd.sock
  kubeletExtraArgs: [{name: node-ip, value: "%[4]s"}]
timeouts: {kubernetesAPICall: 5m, etcdAPICall: 5m}
`, endpoint, token, certificateKey, m.address, m.name))
	m.run("kubeadm", "join", "--config", "/kubeadm.yaml", "--ignore-preflight-errors="+strings.Join(ignoredPreflightErrors, ","))
	return m.node(env)
}

func newCertificateKey() string {
	var key [32]byte
	_, _ = rand.Read(key[:])
	return hex.EncodeToString(key[:])
}

// A reader lists Secrets again and again through one address. No list that succeeds may have
// another value than the one that was written, or ciphertext.
type reader struct {
	t       *testing.T
	name    string
	client  *kubernetes.Clientset
	want    map[string]string
	lists   int
	failed  map[string]int // by error
	longest time.Duration  // without an answer
	wrong   []string
	stop    context.CancelFunc
	wait    sync.WaitGroup
	once    sync.Once
}

func read(t *testing.T, name string, client *kubernetes.Clientset, want map[string]string) *reader {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	r := &reader{t: t, name: name, client: client, want: want, failed: make(map[string]int), stop: stop}
	r.wait.Go(func() {
		last := time.Now()
		for ctx.Err() == nil {
			if r.list(ctx) {
				last = time.Now()
			}
			r.longest = max(r.longest, time.Since(last))
			time.Sleep(50 * time.Millisecond)
		}
	})
	t.Cleanup(r.done)
	return r
}

func (r *reader) list(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	all, err := r.client.CoreV1().Secrets("default").List(ctx, meta.ListOptions{LabelSelector: "read=always"})
	if err != nil {
		text := err.Error()
		r.failed[text]++
		// An API server without the proxy cannot decode ciphertext; one with a proxy that has no
		// key is told of data loss.
		if apierrors.IsInternalError(err) && (strings.Contains(text, "decod") || strings.Contains(text, "DataLoss") || strings.Contains(text, "unmarshal") || strings.Contains(text, "kind")) {
			r.wrong = append(r.wrong, text)
		}
		return false
	}
	r.lists++
	got := make(map[string]string)
	for i := range all.Items {
		got[all.Items[i].Name] = string(all.Items[i].Data["value"])
	}
	if fmt.Sprint(got) != fmt.Sprint(r.want) {
		r.wrong = append(r.wrong, fmt.Sprintf("a list has %d Secrets that are not as they were written", len(got)))
	}
	return true
}

// done stops the reader and checks what it saw. It does nothing when it is called again.
func (r *reader) done() {
	r.once.Do(func() {
		r.stop()
		r.wait.Wait()
		for _, w := range r.wrong[:min(3, len(r.wrong))] {
			r.t.Errorf("%s: %s", r.name, w)
		}
		r.t.Logf("%s: %d lists; %v was the longest time without one", r.name, r.lists, r.longest.Round(time.Millisecond))
		for text, count := range r.failed {
			r.t.Logf("%s: %d times: %s", r.name, count, text)
		}
	})
}

// TestCluster takes a control plane of three nodes through the steps of docs/deploy/kubeadm.md,
// while clients write and read through the load balancer and read through each API server. At the
// end the last node leaves and joins again while etcd holds ciphertext, and the cluster is rolled
// back.
func TestCluster(t *testing.T) {
	needMachines(t)
	env := harness.New(t)
	keepKernelSettings(t)
	network := newNetwork(t)
	b := newBalancer(t, endpoint)
	images := makeImages(t, env)
	certificateKey := newCertificateKey()

	var nodes []*node
	for i := range 3 {
		m := network.newMachine(env, fmt.Sprint("node-", i+1))
		b.add(m.address + ":6443")
		if i == 0 {
			nodes = append(nodes, m.kubeadmInit(env, images, endpoint, certificateKey))
		} else {
			nodes = append(nodes, m.kubeadmJoin(env, images, certificateKey))
		}
	}
	first := nodes[0]
	before := make([][]byte, len(nodes))
	want := make(map[string]string)
	for i, n := range nodes {
		before[i] = n.read(manifest)
	}
	for i := range secrets {
		name := fmt.Sprint("before-", i)
		want[name] = env.Clear.Value(name)
		first.createLabelled(name, want[name], map[string]string{"read": "always"})
	}
	balanced := first.balanced()
	c := balanced.count()
	readers := []*reader{read(t, "through the load balancer", balanced.client, want)}
	for _, n := range nodes {
		readers = append(readers, read(t, n.machine.name, n.client, want))
	}
	page := func(args ...string) []string {
		return append([]string{"kubeadm", "enable", "--image", proxyImage, "--local-key", keyFile}, args...)
	}

	first.run(0, "the API server of this node uses the proxy", page("--decrypt-only", "--create-key")...)
	for _, n := range nodes[1:] {
		n.run(3, "key.yaml does not exist", page("--decrypt-only")...)
		n.takeKey(first)
		n.run(0, "the API server of this node uses the proxy", page("--decrypt-only")...)
	}
	if encrypted, _ := first.stored(); encrypted != 0 {
		t.Fatalf("%d Secrets are encrypted before all nodes decrypt", encrypted)
	}
	for _, n := range nodes {
		n.run(0, "through the proxy  everything", "kubeadm", "status")
	}
	for _, n := range nodes {
		n.run(0, "the API server of this node uses the proxy", page()...)
	}
	first.run(0, "", "reencrypt")
	first.run(0, "", "status")
	first.allEncrypted()
	for i := range secrets {
		nodes[i%len(nodes)].create(fmt.Sprint("after-", i), env.Sealed.Value(fmt.Sprint("after-", i)))
	}
	for _, n := range nodes {
		found, err := env.Sealed.Files(filepath.Join(n.root, "var/lib/etcd"))
		if err != nil || len(found) > 0 {
			t.Errorf("the files of etcd on %s hold plaintext that was written through the proxies: %v, %v", n.machine.name, found, err)
		}
	}

	// A failure on one node rolls that node back, and nothing else. Meanwhile the API server of the
	// node has no etcd, and kubelet may restart it.
	last := nodes[2]
	pod := last.read(podFile)
	last.run(3, "all files are as they were before", append(page(), "--image", "registry.example.com/missing:2", "--timeout", "2m")...)
	if !bytes.Equal(last.read(podFile), pod) {
		t.Error("the proxy's Pod is not as before")
	}
	last.run(0, "through the proxy  everything", "kubeadm", "status")

	first.run(0, "", "kms", "new-local-key", keyFile)
	for _, n := range nodes[1:] {
		n.takeKey(first)
	}
	first.waitCurrent()
	first.run(0, "", "reencrypt")
	first.allEncrypted()

	for _, n := range nodes {
		n.run(0, "uses the proxy", page("--decrypt-only", "--allow-weakening")...)
	}
	first.run(0, "", "reencrypt")
	for _, n := range nodes {
		n.run(0, "without the proxy", "kubeadm", "disable")
	}
	c.done()
	for _, r := range readers {
		r.done()
	}
	if r := readers[0]; r.longest > noDowntime {
		t.Errorf("%v without an answer through the load balancer, want %v or less", r.longest, noDowntime)
	}
	if encrypted, _ := first.stored(); encrypted != 0 {
		t.Errorf("%d Secrets are encrypted still", encrypted)
	}
	for i, n := range nodes {
		if after := n.read(manifest); !bytes.Equal(after, before[i]) {
			t.Errorf("the manifest of %s is not as before:\n%s", n.machine.name, after)
		}
		for i := range secrets {
			n.check(fmt.Sprint("after-", i), env.Sealed.Value(fmt.Sprint("after-", i)))
		}
	}
}

// takeKey copies the key file of another node.
func (n *node) takeKey(from *node) {
	n.t.Helper()
	path := filepath.Join(n.root, keyFile)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		n.t.Fatal(err)
	}
	// As an operator copies it: a new file that replaces the one before.
	if err := os.WriteFile(path+".new", from.read(keyFile), 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		n.t.Fatal(err)
	}
}

// balanced is the node with a client that uses the load balancer.
func (n *node) balanced() *node {
	n.t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(n.root, "etc/kubernetes/admin.conf"))
	if err != nil {
		n.t.Fatal(err)
	}
	config.Host, config.QPS, config.Timeout = "https://"+endpoint, -1, 5*time.Second
	through := *n
	if through.client, err = kubernetes.NewForConfig(config); err != nil {
		n.t.Fatal(err)
	}
	return &through
}

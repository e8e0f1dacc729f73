package kubeadm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// ignoredPreflightErrors are what kubeadm would refuse about this machine.
var ignoredPreflightErrors = []string{
	"SystemVerification", // cgroup v1, where the host has it
}

// kubeadmInit has a machine become the first control-plane node of a cluster, with `kubeadm init`.
// The certificate key encrypts the Secret from which other nodes take the keys of the cluster.
func (m *machine) kubeadmInit(env *harness.Env, images, endpoint, certificateKey string) *node {
	m.t.Helper()
	m.importImages(images)
	m.file("/kubeadm.yaml", fmt.Sprintf(`apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: %[1]s, bindPort: 6443}
bootstrapTokens: [{token: %[5]s}]
certificateKey: "%[6]s"
nodeRegistration:
  name: %[2]s
  criSocket: unix:///run/containerd/containerd.sock
  kubeletExtraArgs: [{name: node-ip, value: "%[1]s"}]
timeouts: {kubernetesAPICall: 5m, etcdAPICall: 5m}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: %[3]s
controlPlaneEndpoint: "%[4]s"
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
# The disk of the machine that runs the test may be nearly full.
evictionHard: {memory.available: 0%%, nodefs.available: 0%%, nodefs.inodesFree: 0%%, imagefs.available: 0%%, imagefs.inodesFree: 0%%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
`, m.address, m.name, kubernetesVersion, endpoint, token, certificateKey))
	m.run("kubeadm", "init", "--config", "/kubeadm.yaml", "--skip-phases=addon", "--upload-certs", "--ignore-preflight-errors="+strings.Join(ignoredPreflightErrors, ","))
	return m.node(env)
}

func (m *machine) importImages(archive string) {
	m.t.Helper()
	in, err := os.Open(archive)
	if err != nil {
		m.t.Fatal(err)
	}
	defer in.Close()
	cmd := m.command(m.t.Context(), "ctr", "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = in
	if out, err := cmd.CombinedOutput(); err != nil {
		m.t.Fatalf("import images: %v\n%s", err, out)
	}
}

// node is the machine as a control-plane node, whose API server is running.
func (m *machine) node(env *harness.Env) *node {
	m.t.Helper()
	n := &node{t: m.t, env: env, root: m.root, machine: m, etcd: m.address + ":2379"}
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(m.root, "etc/kubernetes/admin.conf"))
	if err != nil {
		m.t.Fatal(err)
	}
	config.Host, config.QPS, config.Timeout = fmt.Sprintf("https://%s:6443", m.address), -1, 20*time.Second
	if n.client, err = kubernetes.NewForConfig(config); err != nil {
		m.t.Fatal(err)
	}
	n.waitReady()
	m.t.Cleanup(n.searchLogs)
	return n
}

// searchLogs searches all logs of a machine for secrets.
func (n *node) searchLogs() {
	found, err := n.env.Sealed.Files(filepath.Join(n.root, "var/log"))
	if err != nil {
		n.t.Error(err)
	}
	for _, f := range found {
		n.t.Errorf("a log holds a secret: %v", f)
	}
	if n.t.Failed() {
		for _, pattern := range []string{"*.log", "pods/*/*/*.log"} {
			files, _ := filepath.Glob(filepath.Join(n.root, "var/log", pattern))
			for _, f := range files {
				data, _ := os.ReadFile(f)
				n.t.Logf("--- end of %s\n%s", f, data[max(0, len(data)-4<<10):])
			}
		}
	}
}

// podWithSecret runs a Deployment that mounts a Secret. The Pod needs the controller manager, the
// scheduler and kubelet, which all read Secrets or write objects through the API server.
func (n *node) podWithSecret(name, value string) {
	n.t.Helper()
	n.create(name, value)
	labels := map[string]string{"app": name}
	_, err := n.client.AppsV1().Deployments("default").Create(n.t.Context(), &apps.Deployment{
		ObjectMeta: meta.ObjectMeta{Name: name},
		Spec: apps.DeploymentSpec{
			Selector: &meta.LabelSelector{MatchLabels: labels},
			Template: core.PodTemplateSpec{
				ObjectMeta: meta.ObjectMeta{Labels: labels},
				Spec: core.PodSpec{
					HostNetwork: true, // there is no network of Pods
					Tolerations: []core.Toleration{{Operator: core.TolerationOpExists}},
					Containers: []core.Container{{
						Name: "pause", Image: pauseImage(n.t), VolumeMounts: []core.VolumeMount{{Name: "secret", MountPath: "/secret"}},
					}},
					Volumes: []core.Volume{{Name: "secret", VolumeSource: core.VolumeSource{Secret: &core.SecretVolumeSource{SecretName: name}}}},
				},
			},
		},
	}, meta.CreateOptions{})
	if err != nil {
		n.t.Fatal(err)
	}
	harness.Eventually(n.t, within, "the Pod of "+name+" to run", func() error {
		pods, err := n.client.CoreV1().Pods("default").List(n.t.Context(), meta.ListOptions{LabelSelector: "app=" + name})
		if err != nil {
			return err
		}
		if len(pods.Items) != 1 || pods.Items[0].Status.Phase != core.PodRunning {
			return fmt.Errorf("%d Pods: %+v", len(pods.Items), pods.Items)
		}
		path := fmt.Sprintf("/var/lib/kubelet/pods/%s/volumes/kubernetes.io~secret/secret/value", pods.Items[0].UID)
		out, err := n.machine.command(n.t.Context(), "cat", path).Output()
		if err != nil || string(out) != value {
			return fmt.Errorf("the volume of the Pod holds %d bytes that are not the Secret's value: %w", len(out), err)
		}
		return nil
	})
}

// allEncrypted checks that etcd holds no Secret as plaintext.
func (n *node) allEncrypted() {
	n.t.Helper()
	if encrypted, plaintext := n.stored(); plaintext != 0 || encrypted == 0 {
		n.t.Errorf("etcd holds %d encrypted Secrets and %d others", encrypted, plaintext)
	}
}

// waitCurrent waits until the proxy writes with the newest key.
func (n *node) waitCurrent() {
	n.t.Helper()
	harness.Eventually(n.t, within, "the proxy to write with the new key", func() error {
		n.create(fmt.Sprint("rotated-", time.Now().UnixNano()), n.env.Sealed.Value("rotated"))
		cmd, out := n.command("status", "--output", "json")
		_ = cmd.Run() // 1 while values are stale
		var report struct {
			Rules []struct{ Keys, Current int }
		}
		if err := json.Unmarshal(out.Bytes(), &report); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if r := report.Rules[0]; r.Current == 0 {
			return fmt.Errorf("%d of %d values are current", r.Current, r.Keys)
		}
		return nil
	})
}

// upgrade has kubeadm write the manifests of the control plane again, as an upgrade does, after the
// flag was added to the ConfigMap kubeadm-config. It removes the flag from the ConfigMap again.
func (n *node) upgrade() {
	n.t.Helper()
	const flag = "--etcd-servers=https://127.0.0.1:12379"
	diff := func() string {
		out, _ := n.machine.command(n.t.Context(), "kubeadm", "upgrade", "diff", kubernetesVersion).CombinedOutput()
		return string(out)
	}
	if out := diff(); !strings.Contains(out, "-    - "+flag) {
		n.t.Errorf("without the ConfigMap, an upgrade would keep the proxy:\n%s", out)
	}
	through, pod := n.read(manifest), n.read(podFile)
	n.setExtraArgs(flag)
	// kubeadm moves the flag to another line.
	if out := diff(); strings.Contains(out, "--etcd-servers") && !strings.Contains(out, "+    - "+flag) {
		n.t.Errorf("with the ConfigMap, an upgrade would change the flag:\n%s", out)
	}
	n.machine.run("kubeadm", "upgrade", "apply", kubernetesVersion, "--yes", "--force", "--skip-phases=addon",
		// There is neither CoreDNS nor a network of Pods, so that the node is not ready and no Job
		// runs.
		"--ignore-preflight-errors="+strings.Join(append(ignoredPreflightErrors, "CoreDNSUnsupportedPlugins", "CoreDNSMigration", "CreateJob", "ControlPlaneNodesReady"), ","))
	n.run(0, "through the proxy  everything", "kubeadm", "status")
	if !strings.Contains(string(n.read(manifest)), flag) || !bytes.Equal(n.read(podFile), pod) {
		n.t.Errorf("the upgrade has changed the proxy's Pod or the flag; the manifest was\n%s\nand is\n%s", through, n.read(manifest))
	}
	n.setExtraArgs("")
}

// setExtraArgs replaces the ConfigMap's extra arguments of the API server by one flag, or by none.
func (n *node) setExtraArgs(flag string) {
	n.t.Helper()
	maps := n.client.CoreV1().ConfigMaps("kube-system")
	m, err := maps.Get(n.t.Context(), "kubeadm-config", meta.GetOptions{})
	var cluster map[string]any
	if err == nil {
		err = yaml.Unmarshal([]byte(m.Data["ClusterConfiguration"]), &cluster)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	args := []map[string]string{}
	if name, value, ok := strings.Cut(strings.TrimPrefix(flag, "--"), "="); ok {
		args = append(args, map[string]string{"name": name, "value": value})
	}
	cluster["apiServer"] = map[string]any{"extraArgs": args}
	text, err := yaml.Marshal(cluster)
	if err == nil {
		m.Data["ClusterConfiguration"] = string(text)
		_, err = maps.Update(n.t.Context(), m, meta.UpdateOptions{})
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// TestInit takes a whole control plane of one node, which kubeadm init has made, through the steps
// of docs/deploy/kubeadm.md, while a client writes. kubelet and containerd run everything in
// containers.
func TestInit(t *testing.T) {
	needMachines(t)
	env := harness.New(t)
	keepKernelSettings(t)
	network := newNetwork(t)
	m := network.newMachine(env, "node-1")
	n := m.kubeadmInit(env, makeImages(t, env), m.address+":6443", newCertificateKey())
	n.podWithSecret("app-before", env.Clear.Value("app-before"))
	for i := range secrets {
		n.create(fmt.Sprint("before-", i), env.Clear.Value(fmt.Sprint("before-", i)))
	}
	c := n.count()
	page := func(args ...string) []string {
		return append([]string{"kubeadm", "enable", "--image", proxyImage, "--local-key", keyFile}, args...)
	}
	n.run(0, "through the proxy  nothing", "kubeadm", "status")
	n.run(0, "+    - --etcd-servers=https://127.0.0.1:12379", page("--create-key", "--dry-run")...)
	n.run(0, "the API server of this node uses the proxy", page("--create-key")...)
	n.run(0, "", "reencrypt")
	n.run(0, "", "status")
	n.run(0, "through the proxy  everything", "kubeadm", "status")
	n.allEncrypted()
	n.podWithSecret("app-after", env.Sealed.Value("app-after"))
	for i := range secrets {
		n.create(fmt.Sprint("after-", i), env.Sealed.Value(fmt.Sprint("after-", i)))
	}

	n.run(0, "", "kms", "new-local-key", keyFile)
	n.waitCurrent()
	n.run(0, "", "reencrypt")
	n.run(0, "", "status")
	n.allEncrypted()
	n.run(1, "", "purge", "--yes") // the write-ahead log has plaintext still
	if found, err := env.Clear.Files(filepath.Join(n.root, "var/lib/etcd/member/snap/db")); err != nil || len(found) > 0 {
		t.Errorf("etcd's database holds plaintext: %v, %v", found, err)
	}
	if found, err := env.Sealed.Files(filepath.Join(n.root, "var/lib/etcd")); err != nil || len(found) > 0 {
		t.Errorf("etcd's files hold plaintext that was written through the proxy: %v, %v", found, err)
	}

	n.upgrade()
	// What disable has to restore: the manifest as the upgrade has written it, with the address of
	// etcd.
	before := bytes.Replace(n.read(manifest), []byte("127.0.0.1:12379"), []byte("127.0.0.1:2379"), 1)
	n.run(0, "uses the proxy", page("--decrypt-only", "--allow-weakening")...)
	n.run(0, "", "reencrypt")
	n.run(0, "without the proxy", "kubeadm", "disable")
	c.done()
	if after := n.read(manifest); !bytes.Equal(after, before) {
		t.Errorf("the manifest is not as before:\n%s", after)
	}
	if encrypted, _ := n.stored(); encrypted != 0 {
		t.Errorf("%d Secrets are encrypted still", encrypted)
	}
	for i := range secrets {
		n.check(fmt.Sprint("before-", i), env.Clear.Value(fmt.Sprint("before-", i)))
		n.check(fmt.Sprint("after-", i), env.Sealed.Value(fmt.Sprint("after-", i)))
	}
	n.podWithSecret("app-last", env.Clear.Value("app-last"))
}

package kubeadm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const secrets = 20

// TestLife takes a cluster with Secrets through all that the commands do, while a client writes.
func TestLife(t *testing.T) {
	t.Parallel()
	n := newNode(t, nil)
	before := n.read(manifest)
	for i := range secrets {
		n.create(fmt.Sprintf("before-%d", i), n.env.Clear.Value(fmt.Sprint("before-", i)))
	}
	c := n.count()
	n.run(0, "through the proxy  nothing", "kubeadm", "status")
	n.run(0, "+    - --etcd-servers=https://"+n.listen, n.enable("--decrypt-only", "--local-key", keyFile, "--create-key", "--dry-run")...)
	if !bytes.Equal(n.read(manifest), before) || n.read(podFile) != nil || n.read(configFile) != nil || n.read(keyFile) != nil {
		t.Fatal("a dry run changed something")
	}

	n.run(3, "key.yaml does not exist", n.enable("--decrypt-only", "--local-key", keyFile)...)
	n.run(0, "uses the proxy", n.enable("--decrypt-only", "--local-key", keyFile, "--create-key")...)
	n.wantStored(0, secrets+1)
	n.dryRunOfPod()
	n.run(0, "uses the proxy", n.enable("--local-key", keyFile)...)
	n.run(0, "nothing was changed", n.enable("--local-key", keyFile)...)
	n.run(3, "already exists and differs from the flags", n.enable("--local-key", keyFile, "--kms-name", "other")...)
	n.run(3, "is already enabled, for everything", n.enable("--local-key", keyFile, "--secrets-only")...)
	n.run(0, "through the proxy  everything", "kubeadm", "status")
	for i := range secrets {
		n.create(fmt.Sprintf("after-%d", i), n.env.Sealed.Value(fmt.Sprint("after-", i)))
	}
	n.run(0, "", "reencrypt")
	n.wantStored(2*secrets+1, 0)
	n.run(1, "", "purge", "--yes") // the write-ahead log has plaintext still
	found, err := n.env.Clear.Files(filepath.Join(n.root, "var/lib/etcd/member/snap/db"))
	if err != nil || len(found) > 0 {
		t.Errorf("etcd's database holds plaintext: %v, %v", found, err)
	}

	n.run(0, "", "kms", "new-local-key", keyFile)
	harness.Eventually(t, within, "the proxy to write with the new key", func() error {
		n.create(fmt.Sprint("rotated-", time.Now().UnixNano()), n.env.Sealed.Value("rotated"))
		cmd, out := n.command("status", "--output", "json")
		_ = cmd.Run() // 1 while values are stale
		var report struct {
			Rules []struct {
				Keys, Current int
			}
		}
		if err := json.Unmarshal(out.Bytes(), &report); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if r := report.Rules[0]; r.Current == 0 {
			return fmt.Errorf("%d of %d values are current", r.Current, r.Keys)
		}
		return nil
	})
	n.run(0, "", "reencrypt")
	n.run(0, "", "status")
	found, err = n.env.Sealed.Files(filepath.Join(n.root, "var/lib/etcd"))
	if err != nil || len(found) > 0 {
		t.Errorf("etcd's files hold plaintext that was written through the proxy: %v, %v", found, err)
	}

	n.run(3, "encrypts new values", "kubeadm", "disable")
	n.run(3, "--allow-weakening", n.enable("--local-key", keyFile, "--decrypt-only")...)
	n.run(0, "uses the proxy", n.enable("--local-key", keyFile, "--decrypt-only", "--allow-weakening")...)
	n.run(3, "encrypted values under", "kubeadm", "disable")
	n.run(0, "", "reencrypt")
	n.run(0, "--- ", "kubeadm", "disable", "--dry-run")
	n.run(0, "without the proxy", "kubeadm", "disable", "--timeout", "90s")
	n.run(0, "nothing was changed", "kubeadm", "disable")
	c.done()
	if after := n.read(manifest); !bytes.Equal(after, before) {
		t.Errorf("the manifest is not as before:\n%s", after)
	}
	if n.read(podFile) != nil {
		t.Error("the proxy's Pod is there still")
	}
	if n.read(configFile) == nil || n.read(keyFile) == nil {
		t.Error("the configuration or the key is gone")
	}
	if e, _ := n.stored(); e != 0 {
		t.Errorf("%d Secrets are encrypted still", e)
	}
	for i := range secrets {
		n.check(fmt.Sprintf("before-%d", i), n.env.Clear.Value(fmt.Sprint("before-", i)))
		n.check(fmt.Sprintf("after-%d", i), n.env.Sealed.Value(fmt.Sprint("after-", i)))
	}
	n.run(0, "through the proxy  nothing", "kubeadm", "status")
}

// dryRunOfPod has the API server validate the proxy's static Pod as an object that is created.
func (n *node) dryRunOfPod() {
	n.t.Helper()
	var pod core.Pod
	if err := yaml.UnmarshalStrict(n.read(podFile), &pod); err != nil {
		n.t.Fatal(err)
	}
	// kube-system has no service account without a controller manager
	pod.Spec.AutomountServiceAccountToken = new(bool)
	pod.Annotations["kubernetes.io/config.mirror"] = "as kubelet does"
	pod.Spec.NodeName, pod.Name = "node-1", pod.Name+"-node-1"
	if _, err := n.client.CoreV1().Pods("kube-system").Create(n.t.Context(), &pod, meta.CreateOptions{DryRun: []string{meta.DryRunAll}, FieldValidation: meta.FieldValidationStrict}); err != nil {
		n.t.Errorf("the API server refuses the Pod: %v", err)
	}
}

// TestSecretsOnly sends only Secrets through the proxy, and back.
func TestSecretsOnly(t *testing.T) {
	t.Parallel()
	n := newNode(t, nil)
	before := n.read(manifest)
	n.run(0, "uses the proxy", n.enable("--local-key", keyFile, "--create-key", "--secrets-only")...)
	n.create("s", n.env.Sealed.Value("s"))
	n.wantStored(1, 0)
	n.run(0, "Secrets only", "kubeadm", "status")
	n.run(0, "uses the proxy", n.enable("--local-key", keyFile, "--secrets-only", "--decrypt-only", "--allow-weakening")...)
	n.run(0, "", "reencrypt")
	n.run(0, "without the proxy", "kubeadm", "disable", "--timeout", "90s")
	if !bytes.Equal(n.read(manifest), before) {
		t.Error("the manifest is not as before")
	}
	n.check("s", n.env.Sealed.Value("s"))
}

package cli

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/composesetup"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
)

func TestKubeadmUsage(t *testing.T) {
	for line, want := range map[string]string{
		"kubeadm":                  "needs a command",
		"kubeadm enable":           "--image is missing",
		"kubeadm enable --image i": "no flag names a KMS",
		"kubeadm enable --image i --local-key k --plugin unix:///s":                                   "--local-key and --plugin cannot be used together",
		"kubeadm enable --image i --config c --alibaba-key k":                                         "cannot be used together",
		"kubeadm enable --image i --config c --decrypt-only":                                          "--decrypt-only has no effect",
		"kubeadm enable --image i --plugin unix:///s --create-key":                                    "--create-key needs",
		"kubeadm enable --image i --plugin unix:///s --kms-name a/b":                                  "--kms-name",
		"kubeadm enable --image i --plugin unix:///s --timeout 0s":                                    "--timeout 0s",
		"kubeadm enable --image i --alibaba-key k":                                                    "--alibaba-region is missing",
		"kubeadm enable --image i --alibaba-key k --alibaba-region r --alibaba-credentials oidc":      "oidc is not accessKey or ecsRAMRole",
		"kubeadm enable --image i --alibaba-key k --alibaba-region r --alibaba-credentials accessKey": "--alibaba-access-key-id-file",
		"kubeadm disable --timeout -1s":                                                               "--timeout -1s",
		"kubeadm disable now":                                                                         "",
		"kubeadm status --output yaml":                                                                "",
		"kubeadm status --timeout 0s":                                                                 "--timeout 0s",
	} {
		if r := execute(t, strings.Fields(line)...); r.code != command.ExitUsage || !strings.Contains(r.stderr, want) || !strings.Contains(r.stderr, "hint: ") && want == "" {
			t.Errorf("%q: %+v, want exit code 2 and %q", line, r, want)
		}
	}
}

// TestNamedFiles verifies that namedFiles finds every file that the configuration can name, so that
// the static Pod mounts it.
func TestNamedFiles(t *testing.T) {
	var c config.Config
	want := nameFiles(reflect.ValueOf(&c).Elem(), "")
	got := namedFiles(reflect.ValueOf(&c))
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) || len(want) < 10 {
		t.Errorf("%q, want %q", got, want)
	}
}

// nameFiles sets each file of v to its own path, and returns these.
func nameFiles(v reflect.Value, at string) (all []string) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return nameFiles(v.Elem(), at)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Struct {
			v.Set(reflect.MakeSlice(v.Type(), 2, 2))
			return append(nameFiles(v.Index(0), at+"/0"), nameFiles(v.Index(1), at+"/1")...)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			path := at + "/" + v.Type().Field(i).Name
			if v.Type().Field(i).Tag.Get("file") == "true" {
				v.Field(i).SetString(path)
				all = append(all, path)
			} else {
				all = append(all, nameFiles(v.Field(i), path)...)
			}
		}
	}
	return all
}

// TestKubeadmElsewhere runs the commands on a machine without a control plane.
func TestKubeadmElsewhere(t *testing.T) {
	if _, err := os.Stat("/etc/kubernetes/manifests/kube-apiserver.yaml"); err == nil {
		t.Skip("this machine is a control-plane node")
	}
	key := filepath.Join(t.TempDir(), "key.yaml")
	for _, args := range [][]string{
		{"kubeadm", "status"}, {"kubeadm", "disable"}, {"kubeadm", "enable", "--image", "i", "--local-key", key, "--create-key"},
	} {
		execute(t, args...).want(t, command.ExitFailure, "kube-apiserver.yaml does not exist", "hint: run the command on a control-plane node")
	}
	if _, err := os.Stat(key); err == nil {
		t.Error("a key was created")
	}
}

// TestKubeadmPlan: the plan has a configuration that was checked before it is written, also with a
// key file that does not exist yet.
func TestKubeadmPlan(t *testing.T) {
	dir := t.TempDir()
	if err := composesetup.Run(dir, func(string) string { return "" }, time.Now()); err != nil { // for its certificates
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	manifest, err := os.ReadFile("../kubeadm/testdata/kube-apiserver-1.37.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer("/etc/kubernetes/pki/etcd/ca.crt", at("etcd/ca.crt"), "/etc/kubernetes/pki/apiserver-etcd-client.crt", at("etcd/etcd-1.crt"),
		"/etc/kubernetes/pki/apiserver-etcd-client.key", at("etcd/etcd-1.key")).Replace(string(manifest))
	if err := os.WriteFile(at("kube-apiserver.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	node := &kubeadm.Node{
		Paths: kubeadm.Paths{APIServer: at("kube-apiserver.yaml"), Pod: at("pod.yaml"), Config: at("own/config.yaml"), Backups: at("backup")},
		Settings: kubeadm.Settings{
			Listen: "127.0.0.1:0", Admin: "127.0.0.1:0", ListenerCert: at("etcd/etcd-1.crt"), ListenerKey: at("etcd/etcd-1.key"),
			KMS: kubeadm.KMS{Name: "main", Local: &kubeadm.Local{KeyFile: at("own/key.yaml")}},
		},
		Image: "image", Timeout: time.Second, Check: kubeadmFacts(command.Checks(nil)), Log: t.Logf,
	}
	if _, err := node.Enable(t.Context()); err == nil || !strings.Contains(err.Error(), at("own/config.yaml")+": line 20: kms[0].local.keyFile: "+at("own/key.yaml")+": no such file") {
		t.Errorf("without the key file: %v", err)
	}
	node.Check = kubeadmFacts(config.Checks{KMSFilesMayMiss: true})
	plan, err := node.Enable(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := `# Written by etcd-kms-proxy kubeadm enable.
apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
  - address: 127.0.0.1:0
    tls:
      certFile: DIR/etcd/etcd-1.crt
      keyFile: DIR/etcd/etcd-1.key
      clientCAFile: DIR/etcd/ca.crt
    allowedClients: [etcd-1]
etcd:
  endpoints: ['https://127.0.0.1:2379']
  tls:
    caFile: DIR/etcd/ca.crt
    certFile: DIR/etcd/etcd-1.crt
    keyFile: DIR/etcd/etcd-1.key
kms:
  - name: main
    local:
      keyFile: DIR/own/key.yaml
rules:
  - prefix: /registry/secrets/
    writeWith: main
admin:
  address: 127.0.0.1:0
`
	if got := string(plan.Changes[0].New); got != strings.ReplaceAll(want, "DIR", dir) {
		t.Errorf("configuration:\n%s", got)
	}
	if pod := string(plan.Changes[1].New); !strings.Contains(pod, "path: "+at("etcd/ca.crt")) || strings.Contains(pod, "path: "+at("own/key.yaml")) {
		t.Errorf("the Pod mounts other files than the configuration names outside its folder:\n%s", pod)
	}
}

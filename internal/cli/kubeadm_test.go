package cli

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
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

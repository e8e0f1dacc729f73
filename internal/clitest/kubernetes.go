package clitest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/keyfile"
)

// KubernetesValue is a value that kube-apiserver's own code stored.
type KubernetesValue struct {
	Name, Type, KeyName                string
	Secret, EtcdKey, Plaintext, Stored []byte
}

// KubernetesValues returns values of each type.
func KubernetesValues(t *testing.T) []KubernetesValue {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "crypto", "kubelegacy", "testdata", "kubernetes-vectors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var vs []KubernetesValue
	if err := json.Unmarshal(b, &vs); err != nil || len(vs) == 0 {
		t.Fatal(len(vs), err)
	}
	return vs
}

// KeyFile makes the file of a kubernetes provider.
func (v *KubernetesValue) KeyFile(t *testing.T, path, name string) {
	t.Helper()
	form := keyfile.Form{ID: "name"}
	if err := os.WriteFile(path, []byte("keys:\n"+form.Line(keyfile.Key{ID: name, Secret: v.Secret})), 0o600); err != nil {
		t.Fatal(err)
	}
}

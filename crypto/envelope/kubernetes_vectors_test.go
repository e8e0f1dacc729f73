package envelope

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestKubernetesVectors opens what k8s.io/apiserver's KMS v2 transformer wrote, seeds and keys, and
// every part of it that was damaged must not open. test/interop makes the file (go test -run
// TestVectors . -update) and holds it against k8s.io/apiserver itself.
func TestKubernetesVectors(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("testdata", "kubernetes-vectors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var vs []vector
	if err := json.Unmarshal(b, &vs); err != nil {
		t.Fatal(err)
	}
	if len(vs) == 0 {
		t.Fatal("there are no vectors")
	}
	for _, v := range vs {
		t.Run(v.Name, func(t *testing.T) {
			provider, object, ok := Split(v.Stored)
			if !ok || string(provider) != v.Provider {
				t.Fatalf("Split = %q, %v", provider, ok)
			}
			o, err := Parse(object)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(v.header(), o.Header); diff != "" {
				t.Errorf("header:\n%s", diff)
			}
			seed, err := NewSeed(o.Type, v.Secret)
			if err != nil {
				t.Fatal(err)
			}
			got, err := seed.Open(nil, v.EtcdKey, o.Data)
			if err != nil || !bytes.Equal(got, v.Plaintext) {
				t.Errorf("Open = %q, %v", got, err)
			}
			if _, err := seed.Open(nil, append(bytes.Clone(v.EtcdKey), 'x'), o.Data); err == nil {
				t.Error("opens under another etcd key")
			}
			for i := range o.Data {
				damaged := bytes.Clone(o.Data)
				damaged[i] ^= 1
				if _, err := seed.Open(nil, v.EtcdKey, damaged); err == nil {
					t.Errorf("opens with byte %d changed", i)
				}
				if _, err := seed.Open(nil, v.EtcdKey, o.Data[:i]); err == nil {
					t.Errorf("opens with %d bytes", i)
				}
			}
		})
	}
}

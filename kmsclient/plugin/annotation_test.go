package plugin

import (
	"context"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// annotating is a plugin that answers Encrypt as a file says, and demands its annotations back.
type annotating struct {
	kmsclient.Service
	t      *testing.T
	answer struct {
		Ciphertext  []byte            `json:"ciphertext"`
		KeyID       string            `json:"keyID"`
		Annotations map[string][]byte `json:"annotations"`
	}
}

func (a *annotating) Encrypt(context.Context, string, []byte) (*service.EncryptResponse, error) {
	return &service.EncryptResponse{Ciphertext: a.answer.Ciphertext, KeyID: a.answer.KeyID, Annotations: maps.Clone(a.answer.Annotations)}, nil
}

func (a *annotating) Decrypt(_ context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	for k, v := range a.answer.Annotations {
		if string(req.Annotations[k]) != string(v) {
			a.t.Errorf("annotation %q came back as %q", k, req.Annotations[k])
		}
	}
	return []byte(canary), nil
}

// TestAnnotationWithTrailingDot: kube-apiserver stores what such a plugin answers, so the proxy has
// to wrap and unwrap with it.
func TestAnnotationWithTrailingDot(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "annotation-trailing-dot.json"))
	if err != nil {
		t.Fatal(err)
	}
	a := &annotating{Service: kmstest.NewMemory(), t: t}
	if err := json.Unmarshal(data, &a.answer); err != nil {
		t.Fatal(err)
	}
	c, err := kmsclient.New(kmsclient.Config{Name: "test", Backend: newClient(t, Config{Endpoint: kmstest.PluginServer(t, a)})})
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Encrypt(t.Context(), "uid", []byte(canary))
	if err != nil {
		t.Fatalf("wrap: %v", err)
	}
	got, err := c.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations})
	if err != nil || string(got) != canary {
		t.Errorf("unwrap: %d bytes, %v", len(got), err)
	}
}

package pluginserver

import (
	"bytes"
	"context"
	"maps"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/plugin"
)

// naming is a KMS that names its requests and refuses annotations that it did not give.
type naming struct {
	*kmstest.Memory
	id   string
	more map[string][]byte // further annotations
}

func (n naming) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	kmsclient.NoteRequestID(ctx, n.id)
	res, err := n.Memory.Encrypt(ctx, uid, data)
	if err == nil {
		maps.Copy(res.Annotations, n.more)
	}
	return res, err
}

func (n naming) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	if len(req.Annotations) != 1+len(n.more) {
		return nil, &kmsclient.Error{Op: "Decrypt", Reason: kmsclient.Invalid, Detail: "foreign annotations"}
	}
	return n.Memory.Decrypt(ctx, uid, req)
}

// TestRequestIDs: what is wrapped names the KMS' request, and is unwrapped with that name, without
// it, and with the copies that the proxy adds.
func TestRequestIDs(t *testing.T) {
	m := kmstest.NewMemory()
	n := naming{m, "0b8c7a51-request", nil}
	k := newClient(t, plugin.Config{Endpoint: serve(t, newServer(t, n, nil)).endpoint})
	res, err := k.Encrypt(t.Context(), "uid", []byte(canary))
	if err != nil {
		t.Fatal(err)
	}
	if string(res.Annotations["request-id.etcd-kms-proxy.io"]) != n.id || len(res.Annotations) != 2 {
		t.Errorf("annotations %q", res.Annotations)
	}
	opens := func(what string, s kmsclient.Service, annotations map[string][]byte) {
		t.Helper()
		got, err := s.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: annotations})
		if err != nil || string(got) != canary {
			t.Errorf("%s: %d bytes, %v", what, len(got), err)
		}
	}
	with := func(names ...string) map[string][]byte {
		all := map[string][]byte{"version.kmstest.etcd-kms-proxy.io": res.Annotations["version.kmstest.etcd-kms-proxy.io"]}
		for _, name := range names {
			all[name] = []byte("x")
		}
		return all
	}
	opens("as answered", k, res.Annotations)
	opens("without the name", k, with())
	opens("with recovery copies", k, with("dr.recovery.etcd-kms-proxy.io", "a.b.recovery.etcd-kms-proxy.io", requestIDAnnotation))
	opens("by the KMS itself", n, with())
	// A second server before it, as a proxy on this plugin would be served.
	outer := newClient(t, plugin.Config{Endpoint: serve(t, newServer(t, k, nil)).endpoint})
	opens("through two servers", outer, res.Annotations)
	if twice, err := outer.Encrypt(t.Context(), "uid", []byte(canary)); err != nil || !bytes.Equal(twice.Annotations[requestIDAnnotation], []byte(n.id)) {
		t.Errorf("%+v, %v", twice, err)
	}
	// Annotations that are none of ours must arrive, and be missed where they are missing.
	foreign := with("other.example.com")
	if _, err := k.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: foreign}); err == nil {
		t.Error("a foreign annotation did not reach the KMS")
	}
	if _, err := k.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID}); err == nil {
		t.Error("unwrapped without the KMS' own annotation")
	}
}

// TestNoRequestID leaves annotations as the KMS gave them, where it names nothing, and where the
// name has no room.
func TestNoRequestID(t *testing.T) {
	full := map[string][]byte{"full.example.com": make([]byte, envelope.MaxAnnotations-80)}
	for what, n := range map[string]naming{"nothing": {kmstest.NewMemory(), "", nil}, "no room": {kmstest.NewMemory(), "0b8c7a51", full}} {
		k := newClient(t, plugin.Config{Endpoint: serve(t, newServer(t, n, nil)).endpoint})
		res, err := k.Encrypt(t.Context(), "uid", []byte(canary))
		if err != nil {
			t.Fatal(err)
		}
		if _, has := res.Annotations[requestIDAnnotation]; has || len(res.Annotations) != 1+len(n.more) {
			t.Errorf("%s: annotations %d", what, len(res.Annotations))
		}
		got, err := k.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations})
		if err != nil || string(got) != canary {
			t.Errorf("%s: %v", what, err)
		}
	}
}

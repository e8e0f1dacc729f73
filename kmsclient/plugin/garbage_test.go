package plugin

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// answers is a service that answers what the test sets.
type answers struct {
	encrypt service.EncryptResponse
	decrypt []byte
	status  service.StatusResponse
}

func (a *answers) Encrypt(context.Context, string, []byte) (*service.EncryptResponse, error) {
	return &a.encrypt, nil
}

func (a *answers) Decrypt(context.Context, string, *service.DecryptRequest) ([]byte, error) {
	return a.decrypt, nil
}

func (a *answers) Status(context.Context) (*service.StatusResponse, error) { return &a.status, nil }

// wrapped returns the client of an endpoint as the proxy uses it. Each operation has one attempt.
func wrapped(t *testing.T, endpoint string) *kmsclient.Client {
	t.Helper()
	c, err := kmsclient.New(kmsclient.Config{Name: "test", Backend: newClient(t, Config{Endpoint: endpoint}), MaxAttempts: 1, BreakAfter: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestGarbage has the wrapper refuse what a plugin must not answer.
func TestGarbage(t *testing.T) {
	long := strings.Repeat("x", 1025)
	a := &answers{}
	c := wrapped(t, kmstest.PluginServer(t, a))
	for name, res := range map[string]service.EncryptResponse{
		"nothing":            {},
		"no key ID":          {Ciphertext: []byte("c")},
		"over-long key ID":   {Ciphertext: []byte("c"), KeyID: long},
		"no ciphertext":      {KeyID: "k"},
		"long ciphertext":    {KeyID: "k", Ciphertext: []byte(long)},
		"annotation's name":  {KeyID: "k", Ciphertext: []byte("c"), Annotations: map[string][]byte{"": nil}},
		"annotations' size":  {KeyID: "k", Ciphertext: []byte("c"), Annotations: map[string][]byte{"a.b": make([]byte, 33<<10)}},
		"annotation's label": {KeyID: "k", Ciphertext: []byte("c"), Annotations: map[string][]byte{"A.b": nil}},
	} {
		a.encrypt = res
		if _, err := c.Encrypt(t.Context(), "uid", []byte(canary)); asError(t, err).Class() != kmsclient.ClassContract {
			t.Errorf("Encrypt, %s: %v", name, err)
		}
	}
	for _, data := range [][]byte{nil, make([]byte, 6<<10+1)} {
		a.decrypt = data
		_, err := c.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: []byte("c"), KeyID: "k"})
		if asError(t, err).Class() != kmsclient.ClassContract {
			t.Errorf("Decrypt, %d bytes: %v", len(data), err)
		}
	}
	for name, tc := range map[string]struct {
		res  service.StatusResponse
		want kmsclient.Class
	}{
		"nothing":     {service.StatusResponse{}, kmsclient.ClassContract},
		"no key ID":   {service.StatusResponse{Version: "v2", Healthz: "ok"}, kmsclient.ClassContract},
		"version":     {service.StatusResponse{Version: "v1", Healthz: "ok", KeyID: "k"}, kmsclient.ClassContract},
		"not healthy": {service.StatusResponse{Version: "v2", Healthz: "no", KeyID: "k"}, kmsclient.ClassUnavailable},
	} {
		a.status = tc.res
		_, err := c.Status(t.Context())
		if asError(t, err).Class() != tc.want || strings.Contains(err.Error(), canary) {
			t.Errorf("Status, %s: %v", name, err)
		}
	}
}

// rawCodec hands messages through as they are.
type rawCodec struct{ encoding.Codec }

func (rawCodec) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (rawCodec) Name() string                       { return "proto" }

// TestRawAnswers has a server answer with bytes that are no message, or not the one that is due.
func TestRawAnswers(t *testing.T) {
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var raw []byte
	server := grpc.NewServer(grpc.ForceServerCodec(rawCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var request []byte
		if err := stream.RecvMsg(&request); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		return stream.SendMsg(raw)
	}))
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	defer serving.Wait()
	defer server.Stop()

	c := wrapped(t, "unix://"+path)
	for _, text := range []string{
		"",                         // an empty message
		"\xff",                     // a tag that is cut
		"\x0a\xff\xff\xff\xff\x0f", // a length of 4 GiB
		"\x0a\x7f" + canary,        // a field longer than the message
		"\x12\x02\xff\xfe",         // a key ID (of Encrypt) that is not UTF-8
		"\x08\x96\x01",             // a number where bytes are due
		"\x0b\x0b\x0b",             // groups without an end
		strings.Repeat("\x0a\x00", 1000),
		canary,
	} {
		mu.Lock()
		raw = []byte(text)
		mu.Unlock()
		for op, err := range callAll(t.Context(), c) {
			if err == nil && op == "Decrypt" && text != "" {
				continue // bytes are bytes
			}
			if e := asError(t, err); e.Op != op || strings.Contains(err.Error(), "anary") {
				t.Errorf("%q, %s: %v", text, op, err)
			}
		}
	}
}

package interop

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"
)

const (
	nonceSize = 12
	tagSize   = 16
)

// plugin is a Kubernetes KMS v2 plugin on a unix socket: AES-256-GCM under versioned keys, with the
// annotations as additional data. It is safe for concurrent use.
type plugin struct {
	tb       testing.TB
	endpoint string // unix:///path

	mu       sync.Mutex
	keys     map[string]cipher.AEAD
	current  string
	annotate map[string][]byte // returned with each wrapped DEK seed, and required back
	lenient  bool              // annotations that it did not return are ignored, as most plugins do
	// wrapped DEK seeds are padded with zeros to this length; 0 does not pad
	pad      int
	secrets  map[string][]byte // what was wrapped, by the result
	decrypts int
}

var _ service.Service = (*plugin)(nil)

// startPlugin serves a plugin with one key until the test ends.
func startPlugin(tb testing.TB, keyID string) *plugin {
	tb.Helper()
	// Not tb.TempDir: its path contains the name of the test, and can be too long for a unix
	// socket.
	dir, err := os.MkdirTemp("", "interop")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "kms.sock")
	p := &plugin{tb: tb, endpoint: "unix://" + path, keys: map[string]cipher.AEAD{}, secrets: map[string][]byte{}}
	p.rotate(keyID)
	listener, err := net.Listen("unix", path)
	if err != nil {
		tb.Fatal(err)
	}
	server := grpc.NewServer()
	kmsapi.RegisterKeyManagementServiceServer(server, service.NewGRPCService(path, time.Second, p))
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(listener)
	}()
	tb.Cleanup(func() {
		server.Stop()
		<-done
	})
	return p
}

// rotate adds a key, with a new ID or in place of the key with the same ID, and wraps with it from
// then on.
func (p *plugin) rotate(keyID string) {
	secret := make([]byte, 32)
	rand.Read(secret)
	block, err := aes.NewCipher(secret)
	if err != nil {
		p.tb.Fatal(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		p.tb.Fatal(err)
	}
	p.set(func() { p.keys[keyID], p.current = aead, keyID })
}

func (p *plugin) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

// secret returns the unwrapped DEK seed or key.
func (p *plugin) secret(wrapped []byte) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.secrets[string(wrapped)]
}

func (p *plugin) unwraps() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.decrypts
}

// Status implements service.Service.
func (p *plugin) Status(context.Context) (*service.StatusResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: p.current}, nil
}

// Encrypt implements service.Service.
func (p *plugin) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	aad, err := json.Marshal(p.annotate)
	if err != nil {
		return nil, err
	}
	wrapped := p.keys[p.current].Seal(nil, nil, data, aad)
	wrapped = append(wrapped, make([]byte, max(p.pad-len(wrapped), 0))...)
	p.secrets[string(wrapped)] = bytes.Clone(data)
	return &service.EncryptResponse{Ciphertext: wrapped, KeyID: p.current, Annotations: maps.Clone(p.annotate)}, nil
}

// Decrypt implements service.Service.
func (p *plugin) Decrypt(_ context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.decrypts++
	aead := p.keys[req.KeyID]
	if aead == nil {
		return nil, status.Error(codes.NotFound, "there is no such key")
	}
	var annotations map[string][]byte
	if len(req.Annotations) > 0 {
		annotations = req.Annotations
	}
	if p.lenient {
		annotations = p.annotate
	}
	aad, err := json.Marshal(annotations)
	if err != nil {
		return nil, err
	}
	wrapped := req.Ciphertext
	if p.pad > 0 && len(wrapped) == p.pad {
		wrapped = wrapped[:nonceSize+32+tagSize]
	}
	plain, err := aead.Open(nil, nil, wrapped, aad)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "the ciphertext does not open under this key and these annotations")
	}
	return plain, nil
}

#!/usr/bin/env bash
# Software: k8s.io/apiserver v0.37.2 (kube-apiserver 1.37), its KMS v2 provider.
#
# Expected: a plugin whose Status names the key, and whose Encrypt names the version of the key that
# it used, works: the value says with which version it was encrypted.
#
# Observed: kube-apiserver takes a new seed only if both key IDs are the same. While they differ,
# nothing can be written, although Encrypt works, and each health check asks for one more seed:
#     Status "key", Encrypt "key/1": health fails, a write fails
#     at least one Encrypt call per health check: true
#     Status "key/1", Encrypt "key/1": health succeeds, a write succeeds
#
# Why it matters: with Google's plugin, Status names the key after each start of the plugin and the
# version from the second call on. If it starts after kube-apiserver, the first check fails; probes
# of kube-apiserver fail once with it. The key ID of Encrypt must also be that of the last Status in
# a rotation: a plugin behind which two hosts see a new version at different times flaps.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get k8s.io/apiserver@v0.37.2 k8s.io/kms@v0.37.2 2>go.log || { cat go.log; exit 1; }
cat >encryption.yaml <<YAML
apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms: {apiVersion: v2, name: plugin, endpoint: "unix://$tmp/kms.sock", timeout: 3s}
YAML
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/klog/v2"
	"k8s.io/kms/pkg/service"
)

type plugin struct {
	mu       sync.Mutex
	keyID    string
	encrypts int
}

func (p *plugin) Status(context.Context) (*service.StatusResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: p.keyID}, nil
}

func (p *plugin) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.encrypts++
	return &service.EncryptResponse{Ciphertext: append([]byte("wrapped"), data...), KeyID: "key/1"}, nil
}

func (p *plugin) Decrypt(_ context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	return req.Ciphertext[len("wrapped"):], nil
}

// set changes what Status says, and returns how often Encrypt was called.
func (p *plugin) set(keyID string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.keyID = keyID
	return p.encrypts
}

func main() {
	klog.SetOutputBySeverity("ERROR", os.Stderr)
	dir, err := os.Getwd()
	check(err)
	p := &plugin{keyID: "key"}
	go service.NewGRPCService(dir+"/kms.sock", 5*time.Second, p).ListenAndServe()
	for range 100 { // until the plugin serves
		if _, err = os.Stat("kms.sock"); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	check(err)

	s := start(context.Background())
	show := func(keyID string) {
		health := s.health()
		_, err := s.write("a Secret")
		fmt.Printf("Status %q, Encrypt \"key/1\": health %s, a write %s\n", keyID, say(health), say(err))
	}
	// A failure is remembered for three seconds.
	fail := func() {
		time.Sleep(3100 * time.Millisecond)
		_ = s.health()
	}
	show("key")
	before := p.set("key")
	for range 3 {
		fail()
	}
	// The server's own poll, every ten seconds, may add one.
	fmt.Println("at least one Encrypt call per health check:", p.set("key/1")-before >= 3)
	fail()
	show("key/1")
}

// server is what a kube-apiserver makes of its encryption configuration when it starts.
type server struct {
	config  *encryptionconfig.EncryptionConfiguration
	secrets value.Transformer
}

func start(ctx context.Context) *server {
	config, err := encryptionconfig.LoadEncryptionConfig(ctx, "encryption.yaml", false, "finding")
	check(err)
	return &server{config, config.Transformers[schema.GroupResource{Resource: "secrets"}]}
}

// health is the check behind /readyz and /livez.
func (s *server) health() error {
	req, err := http.NewRequest(http.MethodGet, "/readyz", nil)
	check(err)
	return s.config.HealthChecks[0].Check(req)
}

func (s *server) write(data string) ([]byte, error) {
	return s.secrets.TransformToStorage(context.Background(), []byte(data), value.DefaultContext("/registry/secrets/default/name"))
}

func (s *server) read(stored []byte) (string, error) {
	data, _, err := s.secrets.TransformFromStorage(context.Background(), stored, value.DefaultContext("/registry/secrets/default/name"))
	return string(data), err
}

func say(err error) string {
	if err != nil {
		return "fails"
	}
	return "succeeds"
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go mod tidy 2>go.log || { cat go.log; exit 1; }
go run . 2>run.log | tee out
cat >expected <<'TEXT'
Status "key", Encrypt "key/1": health fails, a write fails
at least one Encrypt call per health check: true
Status "key/1", Encrypt "key/1": health succeeds, a write succeeds
TEXT
if cmp -s out expected; then
  echo "still so: kube-apiserver needs the same key ID from Status and Encrypt"
  exit 0
fi
echo "changed: kube-apiserver takes a seed whose key ID is not that of Status"
exit 1

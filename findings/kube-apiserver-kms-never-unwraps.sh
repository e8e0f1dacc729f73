#!/usr/bin/env bash
# Software: k8s.io/apiserver v0.37.2 (kube-apiserver 1.37), its KMS v2 provider.
#
# Expected: before kube-apiserver encrypts Secrets with a new DEK seed, it has the plugin unwrap the
# seed once, or its health check does so. A plugin that cannot unwrap is then noticed before
# anything is stored.
#
# Observed: kube-apiserver calls Encrypt and Status, and uses the seed at once. With a plugin whose
# Decrypt does not work, such as one whose account may encrypt but not decrypt, the server is
# healthy, and writes and reads succeed, until it is started again:
#     health succeeds
#     a write succeeds
#     a read by the same server succeeds
#     Decrypt calls: 0
#     a read by the next server fails
#
# Why it matters: every Secret that was written since the seed was made is lost, and nothing shows
# it until a restart, a failover to another API server, or the backup is needed. Permissions for
# "encrypt" and "decrypt" are separate in all cloud KMSs, and at least one public plugin loses bytes
# of the seed in Decrypt. Check with a second API server, or a restart, after each change.
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
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/klog/v2"
	"k8s.io/kms/pkg/service"
)

// plugin is one that can encrypt and not decrypt.
type plugin struct{ decrypts int }

func (p *plugin) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "1"}, nil
}

func (p *plugin) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	return &service.EncryptResponse{Ciphertext: append([]byte("wrapped"), data...), KeyID: "1"}, nil
}

func (p *plugin) Decrypt(context.Context, string, *service.DecryptRequest) ([]byte, error) {
	p.decrypts++
	return nil, fmt.Errorf("the caller may not decrypt")
}

func main() {
	klog.SetOutputBySeverity("ERROR", os.Stderr)
	p := &plugin{}
	dir, err := os.Getwd()
	check(err)
	go service.NewGRPCService(dir+"/kms.sock", 5*time.Second, p).ListenAndServe()

	first := start(context.Background())
	for range 100 { // the plugin has just been started
		if err = first.health(); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	fmt.Println("health", say(err))
	stored, err := first.write("a Secret")
	fmt.Println("a write", say(err))
	_, err = first.read(stored)
	fmt.Println("a read by the same server", say(err))
	fmt.Println("Decrypt calls:", p.decrypts)

	second := start(context.Background())
	_, err = second.read(stored)
	fmt.Println("a read by the next server", say(err))
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
health succeeds
a write succeeds
a read by the same server succeeds
Decrypt calls: 0
a read by the next server fails
TEXT
if cmp -s out expected; then
  echo "still so: kube-apiserver stores values under a seed that the plugin never unwrapped"
  exit 0
fi
echo "changed: kube-apiserver notices a plugin that cannot unwrap"
exit 1

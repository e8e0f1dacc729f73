#!/usr/bin/env bash
# Software: k8s.io/apiserver v0.37.2 (kube-apiserver 1.37), its KMS v2 provider. Takes four minutes.
#
# Expected: when the plugin cannot be reached, kube-apiserver, which has the DEK seed in memory, goes
# on as long with writes as with reads, or stops both.
#
# Observed: writes end three minutes after the last successful Status call. Reads of the same value
# go on. No setting changes the three minutes.
#     with the plugin: a write succeeds, a read succeeds
#     2 minutes after the plugin ended: a write succeeds, a read succeeds
#     4 minutes after the plugin ended: a write fails, a read succeeds
#
# Why it matters: an outage of a KMS of three minutes, such as the restart of a Vault that must be
# unsealed, ends every write of Secrets, and with it logins by service account tokens, certificate
# renewals and leader elections that use such objects. It also means that a disabled key goes on to
# decrypt what is cached: the seeds of old values stay usable for 24 hours.
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

type plugin struct{}

func (plugin) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "1"}, nil
}

func (plugin) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	return &service.EncryptResponse{Ciphertext: append([]byte("wrapped"), data...), KeyID: "1"}, nil
}

func (plugin) Decrypt(_ context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	return req.Ciphertext[len("wrapped"):], nil
}

func main() {
	klog.SetOutputBySeverity("ERROR", os.Stderr)
	dir, err := os.Getwd()
	check(err)
	p := service.NewGRPCService(dir+"/kms.sock", 5*time.Second, plugin{})
	go p.ListenAndServe()

	s := start(context.Background())
	for range 100 { // the plugin has just been started
		if err = s.health(); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	check(err)
	stored, err := s.write("a Secret")
	check(err)
	show := func(when string) {
		_, werr := s.write("another")
		_, rerr := s.read(stored)
		fmt.Printf("%s: a write %s, a read %s\n", when, say(werr), say(rerr))
	}
	show("with the plugin")
	p.Close()
	time.Sleep(2 * time.Minute)
	show("2 minutes after the plugin ended")
	time.Sleep(2 * time.Minute)
	show("4 minutes after the plugin ended")
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
with the plugin: a write succeeds, a read succeeds
2 minutes after the plugin ended: a write succeeds, a read succeeds
4 minutes after the plugin ended: a write fails, a read succeeds
TEXT
if cmp -s out expected; then
  echo "still so: without its plugin, kube-apiserver writes for three minutes and reads for longer"
  exit 0
fi
echo "changed: kube-apiserver treats writes and reads without its plugin otherwise"
exit 1

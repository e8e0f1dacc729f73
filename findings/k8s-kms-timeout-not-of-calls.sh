#!/usr/bin/env bash
# Software: k8s.io/kms v0.37.2, grpc-go v1.83.2.
#
# Expected: the timeout of service.NewGRPCService, which plugins offer as their flag -timeout and
# describe as the timeout of the gRPC server, bounds how long a call may take.
#
# Observed: it bounds only how long the handshake of a new connection may take. A handler that needs
# three seconds at a plugin with a timeout of 100 ms answers, and its context has no deadline:
#     timeout of the plugin: 100ms
#     deadline in the handler's context: false
#     Encrypt after 3s: <nil>
#
# Why it matters: nothing in such a plugin ends a call to a vendor that hangs. Only the deadline of
# the caller does, if the plugin passes the context on: kube-apiserver's timeout (3 s by default),
# or a proxy's. A caller without one waits for ever, and handlers that ignore the context gather.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get k8s.io/kms@v0.37.2 google.golang.org/grpc@v1.83.2 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"
)

const timeout = 100 * time.Millisecond

type plugin struct{}

func (plugin) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "1"}, nil
}

func (plugin) Encrypt(ctx context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	_, limited := ctx.Deadline()
	fmt.Println("deadline in the handler's context:", limited)
	select {
	case <-time.After(30 * timeout):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return &service.EncryptResponse{Ciphertext: data, KeyID: "1"}, nil
}

func (plugin) Decrypt(_ context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	return req.Ciphertext, nil
}

func main() {
	dir, err := os.Getwd()
	check(err)
	path := dir + "/kms.sock"
	s := service.NewGRPCService(path, timeout, plugin{})
	go s.ListenAndServe()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	fmt.Println("timeout of the plugin:", timeout)
	begun := time.Now()
	_, err = kmsapi.NewKeyManagementServiceClient(conn).Encrypt(context.Background(), &kmsapi.EncryptRequest{Plaintext: []byte("seed")}, grpc.WaitForReady(true))
	fmt.Printf("Encrypt after %v: %v\n", time.Since(begun).Truncate(time.Second), err)
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go mod tidy 2>go.log || { cat go.log; exit 1; }
go run . | tee out
cat >expected <<'TEXT'
timeout of the plugin: 100ms
deadline in the handler's context: false
Encrypt after 3s: <nil>
TEXT
if cmp -s out expected; then
  echo "still so: the timeout of k8s.io/kms does not bound calls"
  exit 0
fi
echo "changed: k8s.io/kms applies its timeout otherwise, or the machine was very slow"
exit 1

#!/usr/bin/env bash
# Software: k8s.io/kms v0.37.2, the library that most KMS v2 plugins are made with, and Go 1.26.
#
# Expected: a plugin that was killed can be started again. Its server removes the socket that its
# predecessor left, as the server of containerd and other node components do, or says how to.
#
# Observed: GRPCService.ListenAndServe does not remove the socket. After SIGTERM with Shutdown the
# file is gone, because Go removes the socket of a listener that is closed. After SIGKILL it is not,
# and no later start succeeds:
#     start 1: serving
#     socket after SIGTERM: gone
#     start 2: serving
#     socket after SIGKILL: left
#     start 3: listen unix kms.sock: bind: address already in use
#
# Why it matters: a plugin that is ended by the out-of-memory killer, or by a power failure if its
# folder is not a tmpfs, stays down until an operator removes a file. Until then the API server
# writes no Secrets, and a proxy needs its caches. Plugins that remove the socket first (those for age and
# for PKCS#11 do) are not affected; in a unit of systemd, ExecStartPre=rm -f does it.
set -euo pipefail

tmp=$(mktemp -d)
pids=()
cleanup() {
  for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || :; wait "$pid" 2>/dev/null || :; done
  rm -rf "$tmp"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get k8s.io/kms@v0.37.2 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"k8s.io/kms/pkg/service"
)

type plugin struct{}

func (plugin) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "1"}, nil
}

func (plugin) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	return &service.EncryptResponse{Ciphertext: data, KeyID: "1"}, nil
}

func (plugin) Decrypt(_ context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	return req.Ciphertext, nil
}

func main() {
	s := service.NewGRPCService("kms.sock", 5*time.Second, plugin{})
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	go func() { <-ended; s.Shutdown() }()
	if err := s.ListenAndServe(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
GO
go mod tidy 2>go.log || { cat go.log; exit 1; }
go build -o plugin .

start() { # start N: wait until it serves, or has ended
  ./plugin >plugin.log 2>&1 &
  pid=$!
  pids+=("$pid")
  for _ in {1..300}; do
    if ! kill -0 "$pid" 2>/dev/null; then
      echo "start $1: $(head -n 1 plugin.log)"
      return
    fi
    # /proc/net/unix has only sockets that are bound; a leftover file is none of them
    if grep -q " kms.sock\$" /proc/net/unix; then
      echo "start $1: serving"
      return
    fi
    sleep 0.1
  done
  echo "start $1: nothing happened"
}
stop() { # stop SIGNAL
  kill "-$1" "$pid"
  wait "$pid" 2>/dev/null || :
  if [[ -e kms.sock ]]; then echo "socket after SIG$1: left"; else echo "socket after SIG$1: gone"; fi
}
{
  start 1
  stop TERM
  start 2
  stop KILL
  start 3
} >out
cat out
cat >expected <<'TEXT'
start 1: serving
socket after SIGTERM: gone
start 2: serving
socket after SIGKILL: left
start 3: listen unix kms.sock: bind: address already in use
TEXT
if cmp -s out expected; then
  echo "still so: a plugin made with k8s.io/kms does not start while its old socket is there"
  exit 0
fi
echo "changed: k8s.io/kms handles the socket of a killed plugin otherwise"
exit 1

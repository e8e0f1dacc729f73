package rpc

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TextPrefix begins every text that is the proxy's and not etcd's.
const TextPrefix = "etcd-kms-proxy: "

// Error is a status of the proxy's own.
func Error(code codes.Code, text string) error { return status.Error(code, TextPrefix+text) }

package proxy

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ownPrefix begins every text that is the proxy's and not etcd's.
const ownPrefix = "etcd-kms-proxy: "

// ownError is a status of the proxy's own.
func ownError(code codes.Code, text string) error { return status.Error(code, ownPrefix+text) }

package proxy

import (
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// The types of [Config], for callers that need no other package of the data path.
type (
	ListenerConfig = listener.Config
	ListenerTLS    = listener.TLS
	UpstreamConfig = upstream.Config
	UpstreamTLS    = upstream.TLS
	Rule           = etcdapi.Rule
	Sealer         = etcdapi.Sealer
	SealError      = etcdapi.SealError
)

// ErrWouldBlock is [etcdapi.ErrWouldBlock].
var ErrWouldBlock = etcdapi.ErrWouldBlock

// ErrNoFolder is [listener.ErrNoFolder].
var ErrNoFolder = listener.ErrNoFolder

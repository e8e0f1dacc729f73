// Package provider makes the backends of KMS providers from the configuration, and watches the keys
// behind them. [New] is the only place that tells one kind of backend from another; what differs
// between them is in the fields of [Provider]. The package makes no rings and encrypts nothing.
package provider

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/plugin"
)

// Provider is a KMS as configured, without the checks, retries and limits of [kmsclient.Client].
// Fields that a kind does not have are nil or zero.
type Provider struct {
	Kind    string             // as in the configuration
	Service kmsclient.Service  // nil for a provider that only decrypts
	Reader  *kubelegacy.Reader // of a provider that only decrypts
	Timeout time.Duration      // of one call; 0 is the client's default

	Describe          Describe                  // tells more of the key than Status
	KeyOf             func(keyID string) string // the key that a key ID is a version of
	CredentialsExpire func() time.Time          // when the credentials end, or zero if they do not
	credentialsLate   func() bool               // they should have been renewed
	Files             func() error              // why the newest of its files are not in use

	closer io.Closer
}

// Describe asks a KMS for the state of its key.
type Describe = func(context.Context) (*alibaba.KeyInfo, error)

// New makes the backend of k. It connects to nothing. On an error, the result has only its kind.
func New(k config.KMS, log *slog.Logger) (*Provider, error) {
	switch {
	case k.Alibaba != nil:
		return newAlibaba(k.Alibaba, log)
	case k.Plugin != nil:
		b, err := plugin.New(plugin.Config{Endpoint: k.Plugin.Endpoint}) // the client limits the time
		if err != nil {
			return &Provider{Kind: "plugin"}, problem.In("plugin.endpoint", "write unix:///path/to/socket", err)
		}
		return &Provider{Kind: "plugin", Service: b, Timeout: k.Plugin.Timeout, closer: b}, nil
	case k.Local != nil:
		b, err := local.New(local.Config{KeyFile: k.Local.KeyFile})
		if err != nil {
			return &Provider{Kind: "local"}, problem.In("local.keyFile", "etcd-kms-proxy kms new-local-key makes a key file", err)
		}
		return &Provider{Kind: "local", Service: b}, nil
	case k.Kubernetes != nil:
		return newKubernetes(k.Kubernetes)
	}
	return &Provider{Kind: "none"}, errors.New("has no backend")
}

// Check returns what is wrong with k, for [config.Checks].
func Check(k config.KMS) []config.Problem {
	p, err := New(k, slog.New(slog.DiscardHandler))
	if err == nil {
		p.Close()
	}
	return problem.Of(err)
}

// LateCredentials returns when the credentials end, if they should have been renewed, or zero.
func (p *Provider) LateCredentials() time.Time {
	if p.credentialsLate == nil || !p.credentialsLate() {
		return time.Time{}
	}
	return p.CredentialsExpire()
}

// Close releases the connections of the backend.
func (p *Provider) Close() {
	if p.closer != nil {
		_ = p.closer.Close() // nothing depends on it any more
	}
}

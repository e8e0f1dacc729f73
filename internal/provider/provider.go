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
// What a kind can do in addition, its service says by the optional interfaces of package kmsclient.
type Provider struct {
	Kind    string             // as in the configuration
	Service kmsclient.Service  // nil for a provider that only decrypts
	Reader  *kubelegacy.Reader // of a provider that only decrypts
	Offline *AgeKey            // of a provider that only wraps recovery copies
	Timeout time.Duration      // of one call; 0 is the client's default
}

// Describe gets the state of the key from a KMS.
type Describe = func(context.Context) (*kmsclient.KeyInfo, error)

// New makes the backend of k. It connects to nothing. On an error, the result has only its kind.
func New(k config.KMS, log *slog.Logger) (*Provider, error) {
	switch {
	case k.Alibaba != nil:
		b, err := alibaba.New(alibabaConfig(k.Alibaba, log))
		if err != nil {
			return &Provider{Kind: "alibaba"}, problem.In("alibaba", "docs/guides/alibaba-cloud.md says what each field takes", err)
		}
		return &Provider{Kind: "alibaba", Service: b}, nil
	case k.Plugin != nil:
		b, err := plugin.New(plugin.Config{Endpoint: k.Plugin.Endpoint})
		if err != nil {
			return &Provider{Kind: "plugin"}, problem.In("plugin.endpoint", "write unix:///path/to/socket", err)
		}
		return &Provider{Kind: "plugin", Service: b, Timeout: k.Plugin.Timeout}, nil
	case k.Local != nil:
		b, err := local.New(local.Config{KeyFile: k.Local.KeyFile})
		if err != nil {
			return &Provider{Kind: "local"}, problem.In("local.keyFile", "etcd-kms-proxy kms new-local-key makes a key file", err)
		}
		return &Provider{Kind: "local", Service: b}, nil
	case k.Kubernetes != nil:
		return newKubernetes(k.Kubernetes)
	case k.Age != nil:
		key, err := newAgeKey(k.Age)
		return &Provider{Kind: "age", Offline: key}, problem.In("age", "", err)
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

// Describe returns the function that describes the key, or nil if the KMS describes no keys.
func (p *Provider) Describe() Describe {
	if d, ok := p.Service.(kmsclient.Describer); ok {
		return d.Describe
	}
	return nil
}

// KeyOf returns the function that finds the key of a key ID, or nil if key IDs do not tell.
func (p *Provider) KeyOf() func(keyID string) string {
	if k, ok := p.Service.(kmsclient.KeyIDParser); ok {
		return k.KeyOf
	}
	return nil
}

// CheckFiles returns the function that reports why the newest files are not in use, or nil if the
// provider has no files that are read again.
func (p *Provider) CheckFiles() func() error {
	if f, ok := p.Service.(kmsclient.FileChecker); ok {
		return f.CheckFiles
	}
	return nil
}

// CredentialsExpire returns when the credentials end, or zero if they do not.
func (p *Provider) CredentialsExpire() time.Time {
	if s, ok := p.Service.(kmsclient.SessionHolder); ok {
		return s.CredentialsExpire()
	}
	return time.Time{}
}

// LateCredentials returns when the credentials end, if they should have been renewed, or zero.
func (p *Provider) LateCredentials() time.Time {
	if s, ok := p.Service.(kmsclient.SessionHolder); ok && s.CredentialsLate() {
		return s.CredentialsExpire()
	}
	return time.Time{}
}

// Close releases the connections of the backend.
func (p *Provider) Close() {
	if c, ok := p.Service.(io.Closer); ok {
		_ = c.Close() // nothing depends on it any more
	}
}

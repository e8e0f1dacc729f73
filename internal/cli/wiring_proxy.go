package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

func proxyConfig(c *config.Config, rules *ruleSet, a *app, o serveOptions) proxy.Config {
	pc := proxy.Config{
		Upstream:        upstreamConfig(&c.Etcd),
		Rules:           rules.forProxy(),
		MaxRequestBytes: c.Etcd.MaxRequestBytes,
		DrainTimeout:    o.drain,
		Logger:          a.log,
		Registerer:      a.metrics.registry,
		OnDenied:        a.audit.denied,
	}
	pc.Gate, pc.LearnerGate = a.fleet.gate, a.fleet.learnerGate
	if c.Coordination.Enabled {
		pc.OwnPrefixes = a.ownPrefixes
	}
	for _, l := range c.Listeners {
		lc := proxy.ListenerConfig{
			Address: l.Address, Mode: l.FileMode(), AllowedClients: l.AllowedClients, CiphertextClients: l.CiphertextClients,
			AdvertiseClientURLs: l.AdvertiseClientURLs, Endpoint: l.Endpoint, NoGateway: !l.Gateway,
		}
		if name, ok := l.SystemdName(); ok {
			lc.Sockets = o.sockets[name]
		}
		if t := l.TLS; t != nil {
			lc.TLS = &proxy.ListenerTLS{
				CertFile: t.CertFile, KeyFile: t.KeyFile, ClientCAFile: t.ClientCAFile, ClientCRLFile: t.ClientCRLFile,
				MinVersion: t.MinVersion, CipherSuites: t.CipherSuites,
			}
		}
		pc.Listeners = append(pc.Listeners, lc)
	}
	return pc
}

// forProxy returns the rules as the proxy takes them.
func (s *ruleSet) forProxy() []proxy.Rule {
	rules := make([]proxy.Rule, len(s.sealers))
	for i := range s.sealers {
		rules[i] = proxy.Rule{Prefix: s.prefixes[i], Sealer: s.audit.sealer(sealer{s.sealers[i]})}
	}
	return rules
}

// sealer gives a keyring's sealer the errors that the proxy understands.
type sealer struct{ *keyring.Sealer }

var _ proxy.Sealer = sealer{}

// Seal implements [proxy.Sealer].
func (s sealer) Seal(ctx context.Context, key, value []byte) ([]byte, error) {
	out, err := s.Sealer.Seal(ctx, key, value)
	return out, sealError(ctx, err)
}

// Open implements [proxy.Sealer].
func (s sealer) Open(ctx context.Context, key, stored []byte) ([]byte, error) {
	out, err := s.Sealer.Open(ctx, key, stored)
	return out, sealError(ctx, err)
}

// TrySeal implements [proxy.Sealer].
func (s sealer) TrySeal(key, value []byte) ([]byte, error) {
	out, err := s.Sealer.TrySeal(key, value)
	return out, sealError(context.Background(), err)
}

// TryOpen implements [proxy.Sealer].
func (s sealer) TryOpen(key, stored []byte) ([]byte, error) {
	out, err := s.Sealer.TryOpen(key, stored)
	return out, sealError(context.Background(), err)
}

// sealError says what a keyring's error means for the client.
func sealError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, keyring.ErrWouldBlock) {
		return proxy.ErrWouldBlock
	}
	e, ok := errors.AsType[*keyring.Error](err)
	if !ok {
		return err
	}
	var code codes.Code
	switch e.Kind {
	case keyring.Unavailable:
		// A caller who went away, or whose deadline passed, is told so and not that the KMS failed.
		if cause := ctx.Err(); cause != nil {
			return cause
		}
		code = codes.Unavailable
	case keyring.SeedRefused, keyring.KeyUnusable, keyring.Refused:
		code = codes.FailedPrecondition
	case keyring.Corrupt, keyring.Plaintext:
		code = codes.DataLoss
	default:
		return err
	}
	return &proxy.SealError{Code: code, Text: e.Text}
}

// ready reports whether the proxy serves, and beside that which provider does not answer and which rule cannot serve. The proxy stays
// ready for the rest.
func (a *app) ready() proxy.ReadyReport {
	report := a.proxy.Ready()
	for _, r := range a.rings {
		s := r.State()
		report.Checks = append(report.Checks, proxy.Check{Name: "kms " + s.Provider, OK: s.Healthy, Detail: s.Reason})
	}
	report.Checks = append(report.Checks, a.liveChecks()...)
	report.Checks = append(report.Checks, a.recoveryChecks(time.Now())...)
	report.Checks = append(report.Checks, a.audit.ready()...)
	report.Checks = append(report.Checks, a.fleet.ready()...)
	rules := a.rules.Load()
	for i, s := range rules.sealers {
		check := proxy.Check{Name: fmt.Sprintf("rule %q", rules.prefixes[i]), OK: true}
		if err := cmp.Or(a.audit.refusal(), s.Health()); err != nil {
			check.OK, check.Detail = false, err.Error()
		}
		report.Checks = append(report.Checks, check)
	}
	return printableReport(report)
}

// printableReport has each check of r on one printable line: operators read /readyz on a terminal.
func printableReport(r proxy.ReadyReport) proxy.ReadyReport {
	for i := range r.Checks {
		c := &r.Checks[i]
		c.Name, c.Detail = printable(c.Name), printable(strings.ReplaceAll(c.Detail, "\n", "; "))
	}
	return r
}

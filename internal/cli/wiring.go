package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/plugin"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// backend is a KMS as configured, before the wrapper that all of them share. What else it can do, its service says by the optional interfaces of
// package kmsclient.
type backend struct {
	kind    string // as in the configuration
	service kmsclient.Service
	timeout time.Duration      // of one call; 0 is the wrapper's default
	reader  *kubelegacy.Reader // of a provider that only opens values; it has no service
}

// describe returns nil where the KMS tells no more than Status.
func (b *backend) describe() func(context.Context) (*kmsclient.KeyInfo, error) {
	if d, ok := b.service.(kmsclient.Describer); ok {
		return d.Describe
	}
	return nil
}

// credentialsExpire returns nil where the credentials do not end.
func (b *backend) credentialsExpire() func() time.Time {
	if s, ok := b.service.(kmsclient.SessionHolder); ok {
		return s.CredentialsExpire
	}
	return nil
}

// lateCredentials returns when the credentials end, if others should have followed them, or zero.
func (b *backend) lateCredentials() time.Time {
	if s, ok := b.service.(kmsclient.SessionHolder); ok && s.CredentialsLate() {
		return s.CredentialsExpire()
	}
	return time.Time{}
}

// newBackend makes the backend of k. It is the only place that tells one from another. On an error only the kind of the backend is of use.
func newBackend(k config.KMS, log *slog.Logger) (*backend, error) {
	switch {
	case k.Alibaba != nil:
		b, err := alibaba.New(alibabaConfig(k.Alibaba, log))
		return &backend{kind: "alibaba", service: b}, err
	case k.Plugin != nil:
		b, err := plugin.New(plugin.Config{Endpoint: k.Plugin.Endpoint}) // the wrapper keeps the time
		return &backend{kind: "plugin", service: b, timeout: k.Plugin.Timeout}, err
	case k.Local != nil:
		b, err := local.New(local.Config{KeyFile: k.Local.KeyFile})
		return &backend{kind: "local", service: b}, err
	case k.Kubernetes != nil:
		return newKubernetes(k.Kubernetes)
	}
	return &backend{kind: "none"}, errors.New("has no backend")
}

// close lets the backend go, where there is anything to let go.
func (b *backend) close() {
	if c, ok := b.service.(io.Closer); ok {
		_ = c.Close() // it is gone either way
	}
}

// app is everything that serve runs.
type app struct {
	log *slog.Logger
	// inspectOnly is for a command that looks and never seals: no seed is minted.
	inspectOnly bool
	ownPrefixes []string // of keys in etcd that are the proxies' own

	metrics *metrics
	audit   *auditor // nil without an audit block
	calls   *callLog // of a command with an audit block; nil otherwise
	cache   *keyring.Cache
	closers []func()
	rings   []*keyring.Ring
	readers map[string]*kubelegacy.Reader // of the providers that have no ring
	files   []keyFile                     // of the providers whose keys are in a file
	legacy  []*kubernetesKeys
	live    []liveFile // with a check each
	watches []*keyWatch
	fleet   *fleet
	scanner *scanner     // nil without --scan-interval
	renewer *reencryptor // nil without --reencrypt
	proxy   *proxy.Proxy
	admin   *proxy.Admin            // nil without an admin block
	rules   atomic.Pointer[ruleSet] // what the proxy has now
}

// ruleSet is the sealers of all rules, with their prefixes.
type ruleSet struct {
	prefixes []string
	sealers  []*keyring.Sealer
	audit    *auditor

	lifecycle *inventory.Rules // the same, for what works on etcd itself
}

// newApp makes everything that c describes and binds its addresses. It starts nothing. close lets go of it.
func newApp(c *config.Config, log *slog.Logger, o serveOptions) (*app, error) {
	a := &app{log: log}
	if err := a.assemble(c, o); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

func (a *app) assemble(c *config.Config, o serveOptions) error {
	var err error
	if a.audit, err = newAuditor(c.Audit, a.log); err != nil {
		return err
	}
	rules, err := a.assembleKeys(c)
	if err != nil {
		return err
	}
	a.audit.register(a.metrics.registry)
	if a.fleet, err = a.newFleet(c); err != nil {
		return err
	}
	if a.proxy, err = proxy.New(proxyConfig(c, rules, a, o)); err != nil {
		return err
	}
	if c.Admin == nil {
		return nil
	}
	a.admin, err = proxy.NewAdmin(proxy.AdminConfig{
		Address: c.Admin.Address, Gatherer: a.metrics.registry, Ready: a.ready, Pprof: c.Admin.Pprof, Logger: a.log,
	})
	return err
}

// assembleKeys makes what seals and opens: the rings of all providers and the sealers of all rules.
func (a *app) assembleKeys(c *config.Config) (*ruleSet, error) {
	var err error
	a.cache, err = keyring.NewCache(keyring.CacheConfig{
		Seeds: c.Cache.Seeds, TTL: c.Cache.TTL, ServeUnreachableFor: c.Cache.ServeUnreachableFor,
	})
	if err != nil {
		return nil, err
	}
	a.metrics, a.ownPrefixes = newMetrics(a), ownPrefixes(c)
	var problems []error
	for i, k := range c.KMS {
		if err := a.addRing(k, c); err != nil {
			problems = append(problems, fmt.Errorf("kms[%d] %q: %w", i, k.Name, err))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	rules, err := a.newRules(c.Rules)
	if err != nil {
		return nil, err
	}
	if err := a.setRecovery(c.Rules); err != nil {
		return nil, err
	}
	a.rules.Store(rules)
	return rules, nil
}

// addRing makes the backend, the client and the ring of one provider, or its reader.
func (a *app) addRing(k config.KMS, c *config.Config) error {
	b, err := newBackend(k, a.log)
	if err != nil {
		return err
	}
	if b.reader != nil {
		if a.readers == nil {
			a.readers = make(map[string]*kubelegacy.Reader)
		}
		a.readers[k.Name] = b.reader
		keys := &kubernetesKeys{provider: k}
		a.legacy = append(a.legacy, keys)
		a.live = append(a.live, liveFile{"key file of " + k.Name, keys.check})
		return nil
	}
	a.closers = append(a.closers, b.close)
	client, err := kmsclient.New(kmsclient.Config{Name: k.Name, Backend: b.service, Timeout: b.timeout, Observer: a.kmsCall})
	if err != nil {
		return err
	}
	writes := slices.ContainsFunc(c.Rules, func(r config.Rule) bool { return r.WriteWith == k.Name })
	var keyOf func(string) string
	if p, ok := b.service.(kmsclient.KeyIDParser); ok {
		keyOf = p.KeyOf
	}
	ring, err := keyring.New(keyring.RingConfig{
		Provider: k.Name, KMS: a.audit.kms(k.Name, client), Cache: a.cache, KeyOf: keyOf, ReadOnly: !writes || a.inspectOnly,
		PollInterval: k.PollInterval, RevokeWithin: c.Cache.RevokeWithin, SealUnreachableFor: c.Cache.SealUnreachableFor,
		MaxAge: k.SeedMaxAge, MaxSeals: uint64(k.SeedMaxSeals), //nolint:gosec // checked to be positive
		Observer: a.metrics.forProvider(k.Name), Logger: a.log,
	})
	if err != nil {
		return err
	}
	a.rings = append(a.rings, ring)
	if f, ok := b.service.(kmsclient.FileChecker); ok {
		a.live = append(a.live, liveFile{"files of kms " + k.Name, f.CheckFiles})
	}
	if k.Local != nil {
		a.files = append(a.files, keyFile{path: k.Local.KeyFile, seen: digest(k.Local.KeyFile), ring: ring})
	}
	a.watches = append(a.watches, &keyWatch{
		provider: k.Name, describe: a.audited(k.Name, b.describe()), expire: b.credentialsExpire(), late: b.lateCredentials, log: a.log,
		// A key file is its own backup's business, and a key that nothing is written with gets no new copies.
		recovery: func() bool { return b.kind == "local" || !writes || len(ring.Recovery()) > 0 },
		healthy:  func() bool { return ring.State().Healthy },
		flapped:  func() time.Time { return ring.State().Flapped },
	})
	return nil
}

// newRules makes the sealers of rules from the rings there are. A rule that needs another one is an error.
func (a *app) newRules(rules []config.Rule) (*ruleSet, error) {
	set := &ruleSet{audit: a.audit}
	var onEtcd []inventory.Rule
	for i, r := range rules {
		sc := keyring.SealerConfig{
			Prefix: r.Prefix, InspectOnly: a.inspectOnly, AllowPlaintextReads: r.AllowPlaintextReads, Passthrough: r.OnUndecryptable == "passthrough",
			Observer: a.metrics.forRule(r.Prefix),
		}
		var missing []string
		ring := func(name string) *keyring.Ring {
			found := a.ring(name)
			if found == nil {
				missing = append(missing, name)
			}
			return found
		}
		if r.WriteWith != config.Plaintext {
			sc.Write = ring(r.WriteWith)
		}
		var names []string
		for _, name := range r.ReadWith {
			if reader := a.readers[name]; reader != nil {
				names = append(names, reader.Names()...)
			}
			if !a.readWith(&sc, name) {
				missing = append(missing, name)
			}
		}
		for _, name := range r.Recovery {
			sc.Recovery = append(sc.Recovery, ring(name))
		}
		if len(missing) > 0 {
			return nil, fmt.Errorf("rules[%d]: no KMS provider %q is running", i, missing)
		}
		s, err := keyring.NewSealer(sc)
		if err != nil {
			return nil, fmt.Errorf("rules[%d]: %w", i, err)
		}
		set.prefixes, set.sealers = append(set.prefixes, r.Prefix), append(set.sealers, s)
		onEtcd = append(onEtcd, inventory.Rule{Prefix: r.Prefix, WriteWith: r.WriteWith, Sealer: s, Strict: !r.AllowPlaintextReads, KeyNames: names})
	}
	set.lifecycle = inventory.NewRules(onEtcd, a.ownPrefixes...)
	return set, nil
}

// setRules puts rules in place of the running ones, or leaves everything as it is.
func (a *app) setRules(rules []config.Rule) error {
	set, err := a.newRules(rules)
	if err != nil {
		return err
	}
	set.lifecycle = set.lifecycle.Since(a.fleet.revision())
	if err := a.proxy.SetRules(set.forProxy()); err != nil {
		return err
	}
	a.rules.Store(set)
	a.fleet.setRules(rules)
	return a.setRecovery(rules)
}

// close lets go of what newApp took, for an app that was not run or has ended.
func (a *app) close() {
	if a.proxy != nil {
		a.proxy.Close()
	}
	a.fleet.close()
	if a.admin != nil {
		a.admin.Close()
	}
	for _, f := range a.closers {
		f()
	}
	a.audit.close(a.log) // last: what ends before may still be recorded
}

// Package encryption composes what encrypts and decrypts values: the KMS clients and the keyrings
// of all providers, and a sealer for each rule of the configuration. `serve` runs all of it;
// commands that work on stored values run the keyrings only.
//
// It does not listen, and knows etcd only by the keys of the values.
package encryption

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/age"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// Config says which keys to use, and where to report.
type Config struct {
	Config *config.Config
	// private keys of age recipients, for commands only; may be nil
	Identities *age.Identities
	// providers whose keys are treated as lost, with InspectOnly: nothing of them is read or called
	Lost        []string
	InspectOnly bool                  // values are read only, and no DEK seed is generated
	Audit       *auditlog.Log         // of KMS calls and of the use of recovery copies; may be nil
	Record      func(auditlog.Record) // the same for a command; may be nil
	Registry    prometheus.Registerer
	Logger      *slog.Logger
}

// Keys are the providers and the rules. Its methods are safe for concurrent use.
type Keys struct {
	Config
	metrics *metrics
	rings   []*keyring.Ring
	offline []*keyring.Ring // of the providers that only wrap recovery copies
	closers []func()
	runs    []func(context.Context) // what Run runs in addition to the rings
	files   []fileCheck
	watches []*provider.Watch

	current atomic.Pointer[RuleSet]

	mu       sync.Mutex // guards changes of the rules
	readers  map[string]*kubelegacy.Reader
	follower Follower
}

// RuleSet is the sealers of all rules. It does not change.
type RuleSet struct {
	config     []config.Rule
	sealers    []*rule.Sealer
	audit      *auditlog.Log
	generation uint64 // differs between the sets of a process
	stored     *inventory.Rules
}

// Stored returns the rules for work on the values that etcd stores.
func (s *RuleSet) Stored() *inventory.Rules { return s.stored }

// Config returns the rules that the set was made from.
func (s *RuleSet) Config() []config.Rule { return s.config }

// Sealers returns the sealers, in the order of the rules.
func (s *RuleSet) Sealers() []*rule.Sealer { return s.sealers }

// Follower follows changes of the rules.
type Follower struct {
	// Revision returns etcd's revision, after which writes are judged by the new rules; 0 if
	// unknown.
	Revision func() int64
	// Apply puts the rules in force. On an error the earlier rules stay.
	Apply func(*RuleSet) error
}

// OwnPrefixes returns the prefixes of the keys that proxies keep for themselves in etcd.
func OwnPrefixes(c *config.Config) []string {
	if p := c.Coordination.Prefix; p != coordination.DefaultPrefix {
		return []string{p, coordination.DefaultPrefix}
	}
	return []string{coordination.DefaultPrefix}
}

// New makes all providers and sealers of the configuration. It starts nothing. [Keys.Close] must
// follow.
func New(c Config) (*Keys, error) {
	cache, err := keyring.NewCache(keyring.CacheConfig{
		Seeds: c.Config.Cache.Seeds, TTL: c.Config.Cache.TTL, ServeUnreachableFor: c.Config.Cache.ServeUnreachableFor,
	})
	if err != nil {
		return nil, err
	}
	k := &Keys{Config: c, readers: make(map[string]*kubelegacy.Reader)}
	k.metrics = newMetrics(c.Registry, k, cache)
	var problems []error
	for i, p := range c.Config.KMS {
		problems = append(problems, problem.In(fmt.Sprintf("kms[%d]", i), "", k.add(p, cache)))
	}
	err = errors.Join(problems...)
	if err == nil {
		err = k.SetRules(c.Config.Rules)
	}
	if err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

// add makes the backend, the client and the ring of one provider, or its reader.
func (k *Keys) add(p config.KMS, cache *keyring.Cache) error {
	if slices.Contains(k.Lost, p.Name) {
		return k.addLost(p, cache)
	}
	var seen [sha256.Size]byte // digest of the key file, before it is read
	switch {
	case p.Kubernetes != nil:
		seen = filewatch.Digest(p.Kubernetes.KeyFile)
	case p.Local != nil:
		seen = filewatch.Digest(p.Local.KeyFile)
	}
	b, err := provider.New(p, k.Logger)
	if err != nil {
		return err
	}
	if b.Offline != nil {
		return k.addOffline(p, b.Offline, cache)
	}
	if b.Reader != nil {
		k.readers[p.Name] = b.Reader
		k.followFile(&followedFile{
			provider: p.Name, path: p.Kubernetes.KeyFile, name: "key file of " + p.Name, seen: seen,
			good: "key file reloaded", bad: "changed key file cannot be used; the old keys stay in use",
			load: func() ([]any, error) { return nil, k.reloadReader(p) },
		})
		return nil
	}
	k.closers = append(k.closers, b.Close)
	client, err := kmsclient.New(kmsclient.Config{Name: p.Name, Backend: b.Service, Timeout: b.Timeout, Observer: k.observeCall})
	if err != nil {
		return err
	}
	ring, err := keyring.New(keyring.RingConfig{
		Provider: p.Name, KMS: AuditedService(k.Audit, p.Name, client), Cache: cache, KeyOf: b.KeyOf(),
		ReadOnly:     true, // until a rule writes with it
		PollInterval: p.PollInterval, RevokeWithin: k.Config.Config.Cache.RevokeWithin, SealUnreachableFor: k.Config.Config.Cache.SealUnreachableFor,
		MaxAge: p.SeedMaxAge, MaxSeals: uint64(p.SeedMaxSeals), //nolint:gosec // checked to be positive
		Observer: k.metrics.forProvider(p.Name), Logger: k.Logger,
	})
	if err != nil {
		return err
	}
	k.rings = append(k.rings, ring)
	if check := b.CheckFiles(); check != nil {
		k.files = append(k.files, fileCheck{"files of kms " + p.Name, check})
	}
	if p.Local != nil {
		k.runs = append(k.runs, watchKeyFile(p.Local.KeyFile, seen, ring, k.Logger))
	}
	watch := provider.NewWatch(provider.WatchConfig{
		Provider: p.Name, Describe: k.auditedDescribe(p.Name, b.Describe()), Expire: b.CredentialsExpire, Late: b.LateCredentials, Logger: k.Logger,
		// A key file can be backed up, and a key that nothing is written with gets no new copies.
		Recovery: func() bool { return b.Kind == "local" || ring.ReadOnly() || len(ring.Recovery()) > 0 },
		Healthy:  func() bool { return ring.State().Healthy },
		Flapped:  func() time.Time { return ring.State().Flapped },
	})
	k.watches, k.runs = append(k.watches, watch), append(k.runs, watch.Run)
	return nil
}

// Run runs the rings and watches the keys and files until ctx ends. It returns the error of a ring.
func (k *Keys) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, ring := range slices.Concat(k.rings, k.offline) {
		group.Go(func() error { return ring.Run(ctx) })
	}
	for _, run := range append(slices.Clone(k.runs), k.watchFiles) {
		group.Go(func() error { run(ctx); return nil })
	}
	return group.Wait()
}

// Close releases the connections of the providers. Run must have ended.
func (k *Keys) Close() {
	for _, f := range k.closers {
		f()
	}
}

// Rings returns the rings of the providers that have a KMS.
func (k *Keys) Rings() []*keyring.Ring { return k.rings }

// Offline returns the rings of the providers that only wrap recovery copies.
func (k *Keys) Offline() []*keyring.Ring { return k.offline }

// Rules returns the rules in force.
func (k *Keys) Rules() *RuleSet { return k.current.Load() }

// CheckNow polls every KMS ahead of its interval.
func (k *Keys) CheckNow() {
	for _, ring := range k.rings {
		ring.Check()
	}
}

// ring returns the ring of a provider, or nil.
func (k *Keys) ring(name string) *keyring.Ring {
	for _, r := range slices.Concat(k.rings, k.offline) {
		if r.Provider() == name {
			return r
		}
	}
	return nil
}

// Version identifies the rules and keys that values are encrypted with now: it changes with them.
func (k *Keys) Version() string {
	parts := []string{fmt.Sprint(k.current.Load().generation)}
	for _, ring := range slices.Concat(k.rings, k.offline) {
		s := ring.State()
		parts = append(parts, s.Provider, s.KeyID, s.SealedBy)
	}
	return strings.Join(parts, "\x00")
}

// Follow has f follow the changes of the rules from now on.
func (k *Keys) Follow(f Follower) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.follower = f
}

// SetRules replaces the rules, or changes nothing.
func (k *Keys) SetRules(rules []config.Rule) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.setRules(rules)
}

// setRules is SetRules; mu is held.
func (k *Keys) setRules(rules []config.Rule) error {
	set, err := k.newRuleSet(rules)
	if err != nil {
		return err
	}
	old := k.current.Load()
	if old != nil {
		set.generation = old.generation + 1
	}
	if f := k.follower.Revision; f != nil {
		set.stored = set.stored.Since(f())
	}
	k.current.Store(set)
	if f := k.follower.Apply; f != nil {
		if err := f(set); err != nil {
			k.current.Store(old)
			return err
		}
	}
	for _, ring := range k.rings {
		if err := k.setRecovery(ring, rules); err != nil {
			return err
		}
	}
	k.metrics.expectRecoveries(k, rules)
	return nil
}

// startWriting makes a ring generate DEK seeds, with the recovery copies that rules name, if it has
// not written before. ring may be nil.
func (k *Keys) startWriting(ring *keyring.Ring, rules []config.Rule) error {
	if ring == nil || k.InspectOnly || !ring.ReadOnly() {
		return nil
	}
	if err := k.setRecovery(ring, rules); err != nil {
		return err
	}
	ring.StartWriting()
	return nil
}

// newRuleSet makes the sealers of rules from the present rings. mu is held.
func (k *Keys) newRuleSet(rules []config.Rule) (*RuleSet, error) {
	set := &RuleSet{config: rules, audit: k.Audit}
	var stored []inventory.Rule
	for i, r := range rules {
		sc := rule.Config{
			Prefix: r.Prefix, InspectOnly: k.InspectOnly, AllowPlaintextReads: r.AllowPlaintextReads, Passthrough: r.OnUndecryptable == "passthrough",
			Observer: k.metrics.forRule(r.Prefix),
		}
		var missing []string
		ring := func(name string) *keyring.Ring {
			found := k.ring(name)
			if found == nil {
				missing = append(missing, name)
			}
			return found
		}
		if r.WriteWith != config.Plaintext {
			sc.Write = ring(r.WriteWith)
			if err := k.startWriting(sc.Write, rules); err != nil {
				return nil, fmt.Errorf("rules[%d]: %w", i, err)
			}
		}
		var keyNames []string
		for _, name := range r.ReadWith {
			reader := k.readers[name]
			switch {
			case reader != nil:
				sc.Legacy, keyNames = append(sc.Legacy, reader), append(keyNames, reader.Names()...)
			case k.ring(name) == nil && slices.Contains(k.Lost, name): // of kind kubernetes
			default:
				sc.Read = append(sc.Read, ring(name))
			}
		}
		for _, name := range r.Recovery {
			sc.Recovery = append(sc.Recovery, ring(name))
		}
		if len(missing) > 0 {
			return nil, fmt.Errorf("rules[%d]: no KMS provider %q is running", i, missing)
		}
		s, err := rule.New(sc)
		if err != nil {
			return nil, fmt.Errorf("rules[%d]: %w", i, err)
		}
		set.sealers = append(set.sealers, s)
		stored = append(stored, inventory.Rule{Prefix: r.Prefix, WriteWith: r.WriteWith, Sealer: s, Strict: !r.AllowPlaintextReads, KeyNames: keyNames})
	}
	set.stored = inventory.NewRules(stored, OwnPrefixes(k.Config.Config)...)
	return set, nil
}

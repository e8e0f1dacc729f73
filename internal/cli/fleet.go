package cli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// fleet is what a proxy does in etcd on its own account. With coordination off, that is to look once whether it may be.
type fleet struct {
	*coordination.Fleet // nil with coordination off
	config              *config.Config
	client              *clientv3.Client
	gate                chan struct{} // closed once the guard lets the proxy serve
	learnerGate         chan struct{} // closed once it lets the proxy serve what a learner serves
	opened, learning    sync.Once
	next                *nextStart
	audit               *auditor
	log                 *slog.Logger
	bypass              *bypasses                // nil with coordination off
	watch               *inventory.BypassWatcher // nil if nobody watches
	rules               func() *inventory.Rules
}

// ownPrefixes are of the keys that proxies keep in etcd.
func ownPrefixes(c *config.Config) []string {
	if p := c.Coordination.Prefix; p != coordination.DefaultPrefix {
		return []string{p, coordination.DefaultPrefix}
	}
	return []string{coordination.DefaultPrefix}
}

// newFleet makes the fleet of c. It starts nothing; close lets go of it.
func (a *app) newFleet(c *config.Config) (*fleet, error) {
	password, err := etcdPassword(c, a.log)
	if err != nil {
		return nil, err
	}
	if password != nil {
		a.live = append(a.live, liveFile{"etcd.passwordFile", func() error { password.Get(); return password.Problem() }})
	}
	client, err := etcdClient(c, password, a.log)
	if err != nil {
		return nil, err
	}
	f := &fleet{config: c, client: client, gate: make(chan struct{}), learnerGate: make(chan struct{}), next: newNextStart(a), audit: a.audit, log: a.log}
	if !c.Coordination.Enabled {
		return f, nil
	}
	f.bypass = newBypasses(a)
	f.bypass.expect(c.Rules)
	f.rules = func() *inventory.Rules { return a.rules.Load().lifecycle }
	provers := make(map[string]inventory.Sealer)
	for _, ring := range a.rings {
		// InspectOnly: a ring that nothing is written with proves what it sealed earlier.
		s, err := keyring.NewSealer(keyring.SealerConfig{Prefix: c.Coordination.Prefix, Write: ring, Recovery: a.rings, InspectOnly: true})
		if err != nil {
			f.close()
			return nil, fmt.Errorf("coordination: %w", err)
		}
		provers[ring.Provider()] = s
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	var id [6]byte
	_, _ = rand.Read(id[:]) // never fails
	f.Fleet = coordination.NewFleet(coordination.FleetConfig{
		Client: client, Prefix: c.Coordination.Prefix, ProofSealers: provers, Logger: a.log,
		Self: coordination.Member{
			ID: host + "-" + hex.EncodeToString(id[:]), Host: host, PID: os.Getpid(), Version: readBuildInfo().Version, Started: time.Now().UTC().Truncate(time.Second),
		},
	})
	f.SetPolicy(policyOf(c.Rules, c.Audit))
	if c.Coordination.WatchBypass {
		f.watch = inventory.NewBypassWatcher(inventory.BypassConfig{Client: client, Rules: f.rules, Found: f.bypass.found, Logger: a.log})
	}
	return f, nil
}

// run guards the start, and then announces this proxy until ctx ends. It returns an error if the proxy must not serve.
func (f *fleet) run(ctx context.Context, allowWeakening bool) error {
	g := &guard{
		fleet: f.Fleet, client: f.client, config: f.config, allow: allowWeakening, audit: f.audit, log: f.log,
		open:    func() { f.opened.Do(func() { close(f.gate) }) },
		learner: func() { f.learning.Do(func() { close(f.learnerGate) }) },
	}
	group, ctx := errgroup.WithContext(ctx)
	opened := func(run func(context.Context) error) {
		group.Go(func() error {
			select {
			case <-f.gate:
				return run(ctx)
			case <-ctx.Done():
				return nil
			}
		})
	}
	group.Go(func() error { return g.run(ctx) })
	opened(func(ctx context.Context) error { return f.next.run(ctx, g) })
	if f.Fleet != nil {
		opened(func(ctx context.Context) error { f.Run(ctx); return nil })
	}
	if f.watch != nil {
		opened(func(ctx context.Context) error { f.watch.Run(ctx); return nil })
	}
	return group.Wait()
}

func (f *fleet) close() {
	if f != nil {
		_ = f.client.Close() // it reports the end of its own context
	}
}

// revisionWait is how long a reload waits to learn etcd's revision, from which on writes under new rules are watched.
const revisionWait = time.Second

// revision is etcd's at the moment, 0 if it does not say or nobody wants to know.
func (f *fleet) revision() int64 {
	if f.watch == nil {
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), revisionWait)
	defer cancel()
	r, err := f.Revision(ctx)
	if err != nil {
		return 0 // the watch begins where etcd is when it answers
	}
	return r
}

// setRules follows a reload.
func (f *fleet) setRules(rules []config.Rule) {
	if f.Fleet != nil {
		f.SetPolicy(policyOf(rules, f.config.Audit)) // the audit block waits for a restart
	}
	if f.bypass != nil {
		f.bypass.expect(rules)
	}
	if f.watch != nil {
		f.watch.RulesChanged()
	}
}

func (f *fleet) ready() []proxy.Check {
	check := proxy.Check{Name: "agreement", OK: true}
	select {
	case <-f.gate:
	default:
		check.OK, check.Detail = false, "the rules were not compared yet with those that the proxies agreed on: nothing is served"
		select {
		case <-f.learnerGate:
			check.Detail = "the member of etcd is a learner: what a learner serves is served, and the rules are compared once it is promoted"
		default:
		}
	}
	checks := []proxy.Check{check, f.next.ready()}
	if f.Fleet == nil {
		// With coordination off there is nothing to tell while all is well.
		return slices.DeleteFunc(checks, func(c proxy.Check) bool { return c.OK })
	}
	return append(checks, f.bypass.ready(time.Now()))
}

// bypasses counts plaintext that was stored past the proxies, and tells of each key once.
type bypasses struct {
	audit *auditor
	log   *slog.Logger
	count *prometheus.CounterVec
	told  *lru.Cache[string, struct{}]
	last  atomic.Int64 // when the last was seen, in Unix seconds
	quiet atomic.Int64 // until when the log is silent, in Unix seconds
}

const (
	bypassKeys   = 10_000    // of which each is told once
	bypassNotice = time.Hour // how long readyz shows the last one
	bypassQuiet  = time.Minute
)

func newBypasses(a *app) *bypasses {
	b := &bypasses{audit: a.audit, log: a.log, count: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "etcd_kms_proxy_plaintext_writes_seen_total", Help: "Values stored in plaintext under a rule that seals, past the proxies.",
	}, []string{"rule"})}
	b.told, _ = lru.New[string, struct{}](bypassKeys) // fails on sizes below 1 only
	a.metrics.registry.MustRegister(b.count)
	return b
}

// expect has the counters of rules begin at 0: an increase from a counter that was not there is none
// to Prometheus.
func (b *bypasses) expect(rules []config.Rule) {
	for _, r := range rules {
		if r.WriteWith != config.Plaintext {
			b.count.WithLabelValues(utf8Name(r.Prefix))
		}
	}
}

// found is told of each.
func (b *bypasses) found(rule *inventory.Rule, key string, revision int64) {
	now := time.Now().Unix()
	b.last.Store(now)
	b.count.WithLabelValues(utf8Name(rule.Prefix)).Inc()
	if seen, _ := b.told.ContainsOrAdd(key, struct{}{}); seen {
		return
	}
	b.audit.record(auditlog.Record{Event: auditlog.EventBypass, Rule: utf8Name(rule.Prefix), Key: utf8Name(key), KeyBytes: inventory.KeyBytes(key), Revision: revision})
	// The audit log has all of them; somebody who writes many does not fill the other one.
	if quiet := b.quiet.Load(); now >= quiet && b.quiet.CompareAndSwap(quiet, now+int64(bypassQuiet.Seconds())) {
		b.log.Error("a value was stored in plaintext under a rule that seals: somebody writes to etcd past the proxies", "rule", utf8Name(rule.Prefix), "key", utf8Name(key),
			"revision", revision, "hint", bypassHint(rule))
	}
}

// bypassHint says what to do about a value that was written past the proxies. What a rule does not let clients read, nothing encrypts unasked.
func bypassHint(rule *inventory.Rule) string {
	if rule.Strict {
		return "find out who wrote it; reads of it are refused and reencrypt leaves it, since the rule has allowPlaintextReads: false; delete it, or write it again through a proxy"
	}
	return "find out who wrote it; reads return it as it is, and reencrypt encrypts it as it is: delete it first if it is not genuine"
}

func (b *bypasses) ready(now time.Time) proxy.Check {
	check := proxy.Check{Name: "bypass", OK: true}
	if last := time.Unix(b.last.Load(), 0); now.Sub(last) < bypassNotice {
		check.OK, check.Detail = false, "plaintext was stored under a rule that seals, past the proxies, last at "+last.UTC().Format(time.RFC3339)
	}
	return check
}

package server

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

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/buildinfo"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/encryption"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/etcdclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/guard"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/periodic"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// fleet is what a proxy does in etcd for itself: the guard of the start, and with coordination on
// the agreement with other proxies and the watch for plaintext that is written to etcd directly.
type fleet struct {
	*coordination.Fleet // nil with coordination off
	config              *config.Config
	client              *clientv3.Client
	password            *etcdclient.Password // nil without a user
	guard               *guard.Guard
	next                *guard.NextStart
	gate                chan struct{} // closed once the guard lets the proxy serve
	learnerGate         chan struct{} // closed once it lets the proxy serve what a learner serves
	restores            atomic.Int64  // of etcd, as far as a watch or a response showed them
	bypasses            *bypasses     // nil with coordination off
	watch               *inventory.BypassWatcher
	stored              func() *inventory.Rules
}

// newFleet makes the fleet of c. It starts nothing; close must follow.
func newFleet(c *config.Config, keys *encryption.Keys, audit *auditlog.Log, reg prometheus.Registerer, log *slog.Logger, o Options) (*fleet, error) {
	client, password, err := etcdclient.New(c, log)
	if err != nil {
		return nil, err
	}
	f := &fleet{
		config: c, client: client, password: password, gate: make(chan struct{}), learnerGate: make(chan struct{}),
		next: guard.NewNextStart(reg, log), stored: func() *inventory.Rules { return keys.Rules().Stored() },
	}
	if c.Coordination.Enabled {
		if err := f.coordinate(keys, audit, reg, log, o.jobs()); err != nil {
			f.close()
			return nil, err
		}
	}
	f.guard = &guard.Guard{
		Fleet: f.Fleet, Client: client, Config: c, AllowWeakening: o.AllowWeakening, Audit: audit, Logger: log,
		Open: sync.OnceFunc(func() { close(f.gate) }), OpenLearner: sync.OnceFunc(func() { close(f.learnerGate) }),
	}
	return f, nil
}

// coordinate adds what is on with coordination.
func (f *fleet) coordinate(keys *encryption.Keys, audit *auditlog.Log, reg prometheus.Registerer, log *slog.Logger, jobs []string) error {
	c := f.config
	f.bypasses = newBypasses(audit, reg, log)
	f.bypasses.expect(c.Rules)
	provers := make(map[string]inventory.Sealer)
	for _, ring := range keys.Rings() {
		// InspectOnly: a ring that nothing is written with verifies what it encrypted earlier.
		s, err := rule.New(rule.Config{Prefix: c.Coordination.Prefix, Write: ring, Recovery: keys.Rings(), InspectOnly: true})
		if err != nil {
			return fmt.Errorf("coordination: %w", err)
		}
		provers[ring.Provider()] = s
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	var id [6]byte
	_, _ = rand.Read(id[:]) // never fails
	restored := func() { f.restores.Add(1) }
	f.Fleet = coordination.NewFleet(coordination.FleetConfig{
		Client: f.client, Prefix: c.Coordination.Prefix, ProofSealers: provers, Restored: restored, Logger: log,
		Self: coordination.Member{
			ID: host + "-" + hex.EncodeToString(id[:]), Host: host, PID: os.Getpid(), Version: buildinfo.Read().Version,
			Started: time.Now().UTC().Truncate(time.Second), Jobs: jobs,
		},
	})
	f.SetPolicy(guard.PolicyOf(c.Rules, c.Audit))
	if c.Coordination.WatchBypass {
		f.watch = inventory.NewBypassWatcher(inventory.BypassConfig{Client: f.client, Rules: f.stored, Found: f.bypasses.found, Restored: restored, Logger: log})
	}
	return nil
}

// run waits for the guard of the start, and then announces this proxy until ctx ends. It returns an
// error if the proxy must not serve.
func (f *fleet) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	opened := func(run part) {
		group.Go(func() error {
			select {
			case <-f.gate:
				return run(ctx)
			case <-ctx.Done():
				return nil
			}
		})
	}
	opened(func(ctx context.Context) error { return f.next.Run(ctx, f.guard) })
	if f.Fleet != nil {
		opened(infallible(f.Run))
	}
	if f.watch != nil {
		opened(infallible(f.watch.Run))
	}
	return group.Wait()
}

// watchPassword reads the password file from time to time, so that a bad one is logged before it is
// needed, until ctx ends.
func (f *fleet) watchPassword(ctx context.Context) {
	if f.password != nil {
		periodic.Run(ctx, time.Second, func() { f.password.Get() })
	}
}

func (f *fleet) close() { _ = f.client.Close() } // it returns the end of its own context

// revisionWait is how long a reload waits for etcd's revision, after which writes are judged by the
// new rules.
const revisionWait = time.Second

// revision returns etcd's revision, or 0 if etcd does not respond or nothing is watched.
func (f *fleet) revision() int64 {
	if f.watch == nil {
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), revisionWait)
	defer cancel()
	r, err := f.Revision(ctx)
	if err != nil {
		return 0 // the watch begins at etcd's revision when it responds
	}
	return r
}

// setRules follows a reload.
func (f *fleet) setRules(rules []config.Rule) {
	if f.Fleet != nil {
		f.SetPolicy(guard.PolicyOf(rules, f.config.Audit)) // the audit block needs a restart
		f.bypasses.expect(rules)
	}
	if f.watch != nil {
		f.watch.RulesChanged()
	}
}

func (f *fleet) ready() []readiness.Check {
	check := readiness.Check{Name: "agreement", OK: true}
	select {
	case <-f.gate:
	default:
		check.OK, check.Detail = false, "the rules were not yet compared with those that the proxies agreed on: nothing is served"
		select {
		case <-f.learnerGate:
			check.Detail = "the etcd member is a learner: the proxy serves what a learner serves, and compares the rules once it is promoted"
		default:
		}
	}
	checks := []readiness.Check{check, f.next.Check()}
	if f.Fleet == nil {
		// With coordination off, only problems are shown.
		return slices.DeleteFunc(checks, func(c readiness.Check) bool { return c.OK })
	}
	return append(checks, f.bypasses.ready(time.Now()))
}

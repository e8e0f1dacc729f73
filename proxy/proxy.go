package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/gateway"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/relay"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// Config is what a Proxy is made of. The zero value of a field is its documented default.
type Config struct {
	Listeners []listener.Config // at least one
	Upstream  upstream.Config
	Rules     []etcdapi.Rule // no two with one prefix; none: every value passes as it is
	// OwnPrefixes are of keys that proxies keep in etcd for themselves: no rule holds for them, and
	// clients cannot change them. Each ends in a slash and is more than that; an empty one does not
	// count.
	OwnPrefixes []string
	// MaxRequestBytes is etcd's --max-request-bytes, applied to the plaintext; 0: 1.5 MiB, as
	// etcd's.
	MaxRequestBytes int
	// DrainTimeout bounds how long Run lets calls finish after its context has ended; 0: 10 s.
	DrainTimeout time.Duration
	Logger       *slog.Logger          // nil: nothing is logged
	Registerer   prometheus.Registerer // nil: metrics are not registered
	// Gate holds calls back until it is closed; while it is open they wait as they wait for etcd,
	// and are then Unavailable. Nil: nothing is held back.
	Gate <-chan struct{}
	// LearnerGate, if it is closed while Gate is not, lets those calls go on that a learner of etcd
	// serves. They carry no write. Nil: nothing goes on before Gate is closed.
	LearnerGate <-chan struct{}
	// OnDenied is told of a denied client whenever the log is: by the listener's address as
	// configured, the client's name and its address. It is called on the call's goroutine. May be
	// nil.
	OnDenied func(listener, client, remote string)
}

// The defaults of Config.
const (
	DefaultMaxRequestBytes = 1536 * 1024
	DefaultDrainTimeout    = 10 * time.Second
)

// Proxy serves etcd's client API with the values under its rules encrypted. Its methods are safe
// for concurrent use.
type Proxy struct {
	core        *etcdapi.Core
	upstream    *upstream.Cluster   // to all endpoints
	upstreams   []*upstream.Cluster // all there are
	api         *etcdapi.API
	engine      *relay.Engine
	gateway     *gateway.Gateway
	drain       time.Duration
	listeners   []*listener.Listener
	serving     atomic.Bool
	listenersUp atomic.Int64
	ran         atomic.Bool
	releaseOnce sync.Once
}

// New checks cfg, loads its files and binds its addresses, so that a port in use is an error at
// once. It connects to nothing and starts nothing; one of Run and Close must follow.
func New(cfg Config) (*Proxy, error) {
	if len(cfg.Listeners) == 0 {
		return nil, errors.New("listeners: there is none")
	}
	if cfg.MaxRequestBytes < 0 || cfg.DrainTimeout < 0 {
		return nil, errors.New("maxRequestBytes and drainTimeout must not be negative")
	}
	if cfg.MaxRequestBytes == 0 {
		cfg.MaxRequestBytes = DefaultMaxRequestBytes
	}
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = DefaultDrainTimeout
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	rules, err := etcdapi.NewRuleSet(cfg.Rules, cfg.OwnPrefixes...)
	if err != nil {
		return nil, err
	}
	m, err := metrics.New(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	p := &Proxy{drain: cfg.DrainTimeout, core: etcdapi.NewCore(rules, cfg.MaxRequestBytes, log)}
	p.core.Gate, p.core.LearnerGate = cfg.Gate, cfg.LearnerGate
	var problems []error
	if p.upstream, err = p.newUpstream(cfg.Upstream, log, m); err != nil {
		problems = append(problems, err)
	}
	for _, lc := range cfg.Listeners {
		l, err := p.listen(lc, cfg.Upstream, log, m)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		p.listeners = append(p.listeners, l)
	}
	if err := errors.Join(problems...); err != nil {
		p.Close()
		return nil, err
	}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(&certificateExpiry{listeners: p.listeners, etcd: p.upstream.HTTP.Tls}); err != nil {
			p.Close()
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	p.api = etcdapi.New(p.core, p.upstream, m, log, listener.NewDenials(log, cfg.OnDenied))
	if p.gateway, err = gateway.New(p.api); err != nil {
		p.Close()
		return nil, err
	}
	p.engine = relay.New(p.api, p.gateway.Handler, p.drain, log)
	return p, nil
}

// newUpstream keeps account of all of them. Only the first is measured.
func (p *Proxy) newUpstream(cfg upstream.Config, log *slog.Logger, m *metrics.Metrics) (*upstream.Cluster, error) {
	u, err := upstream.New(cfg, log, m)
	if err == nil {
		p.upstreams = append(p.upstreams, u)
	}
	return u, err
}

// listen binds a listener, which leads to all of etcd or to one endpoint of its own.
func (p *Proxy) listen(lc listener.Config, etcd upstream.Config, log *slog.Logger, m *metrics.Metrics) (*listener.Listener, error) {
	to := p.upstream
	if lc.Endpoint != "" {
		if at := slices.Index(etcd.Endpoints, lc.Endpoint); at >= 0 && at < len(etcd.HTTPEndpoints) {
			etcd.HTTPEndpoints = etcd.HTTPEndpoints[at : at+1]
		}
		etcd.Endpoints = []string{lc.Endpoint}
		var err error
		if to, err = p.newUpstream(etcd, log, nil); err != nil {
			return nil, fmt.Errorf("listener %s: %w", lc.Address, err)
		}
		p.core.Pinned = append(p.core.Pinned, lc)
	}
	l, err := listener.Listen(lc, log, m)
	if err == nil {
		l.Upstream = to
	}
	return l, err
}

// Addrs returns the bound addresses, in the order of Config.Listeners.
func (p *Proxy) Addrs() []net.Addr {
	addrs := make([]net.Addr, len(p.listeners))
	for i, l := range p.listeners {
		addrs[i] = l.Addr()
	}
	return addrs
}

// SetRules puts rules in place of the ones in use, all at once. Calls in flight keep what they have
// sealed and open their answers under the new rules. On an error the old ones stay.
func (p *Proxy) SetRules(rules []etcdapi.Rule) error {
	set, err := etcdapi.NewRuleSet(rules)
	if err != nil {
		return err
	}
	set.Own = p.core.Rules.Load().Own
	p.core.Rules.Store(set)
	return nil
}

// SetClients puts lists in place of AllowedClients and CiphertextClients of the listener that is at
// index i of Config.Listeners, and ends the connections of clients that these treat differently. It
// is an error if the listener does not ask clients for certificates and a list is not empty; the
// old ones then stay.
func (p *Proxy) SetClients(i int, allowed, ciphertext []string) error {
	return p.listeners[i].SetClients(allowed, ciphertext)
}

// Run serves until ctx ends, and then drains: it stops accepting, gives the connections that it has
// accepted up to [listener.LateHandshake] to say who they are, asks clients to go elsewhere, ends
// watches and other calls that wait for events with Unavailable, lets the others finish, and ends
// what is left when Config.DrainTimeout is over. It returns nil after a drain, and may be
// called once.
func (p *Proxy) Run(ctx context.Context) error {
	if p.ran.Swap(true) {
		return errors.New("run proxy: it has run before")
	}
	defer p.Close()
	var all sync.WaitGroup
	defer all.Wait()
	lasting, stop := context.WithCancel(context.WithoutCancel(ctx)) // what must outlive the drain
	defer stop()
	for _, u := range p.upstreams {
		all.Go(func() { u.Run(lasting) })
	}

	accepting, stopAccepting := context.WithCancel(ctx)
	defer stopAccepting()
	var listening sync.WaitGroup
	for _, l := range p.listeners {
		p.listenersUp.Add(1)
		listening.Go(func() {
			defer p.listenersUp.Add(-1)
			l.Run(accepting, p.serve)
		})
		all.Go(func() { l.RecheckUntil(lasting) })
	}
	all.Go(func() { p.watchFiles(lasting) })
	defer p.closeListeners()
	defer context.AfterFunc(ctx, p.closeListeners)()
	p.serving.Store(true)
	defer p.serving.Store(false)
	handling, stopHandling := context.WithCancel(lasting)
	defer stopHandling()
	var draining sync.WaitGroup
	draining.Go(func() { p.gateway.Run(handling, p.drain) })
	<-ctx.Done()
	listening.Wait() // for the connections that were accepted before: their calls are served, too
	stopHandling()
	p.engine.Drain()
	draining.Wait()
	return nil
}

// serve hands a connection to the server of its protocol.
func (p *Proxy) serve(conn *listener.Conn) {
	if conn.HTTP1 {
		p.gateway.Serve(conn)
		return
	}
	p.engine.Serve(conn)
}

func (p *Proxy) closeListeners() {
	for _, l := range p.listeners {
		_ = l.Close()
	}
}

// Close lets go of what New took. Run does it too; it may be called more than once.
func (p *Proxy) Close() {
	p.releaseOnce.Do(func() {
		p.closeListeners()
		if p.api != nil {
			p.api.Stop()
			if p.engine != nil {
				p.engine.Close()
			}
			p.api.Running.Wait()
		}
		for _, u := range p.upstreams {
			u.Close()
		}
	})
}

// Ready reports whether the proxy serves, and whether etcd answers. Only the former decides: while
// etcd is away its clients are to see that from the answers, not from a proxy that goes away too.
func (p *Proxy) Ready() readiness.Report {
	up := p.serving.Load() && int(p.listenersUp.Load()) == len(p.listeners)
	report := readiness.Report{Ready: up, Checks: []readiness.Check{{Name: "listeners", OK: up}, {Name: "etcd", OK: p.upstream.Connected.Load()}}}
	if !up {
		report.Checks[0].Detail = "not serving"
	}
	if !report.Checks[1].OK {
		report.Checks[1].Detail = "no endpoint is connected"
	}
	report.Checks = append(report.Checks, p.fileChecks()...)
	return report
}

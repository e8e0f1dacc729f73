// Package guard keeps a proxy from serving with rules that protect keys less than the rules that
// the proxies of an etcd agreed on. The agreed rules are a record in etcd, which
// [coordination.Fleet] keeps; this package compares the configuration with it at the start, and
// checks while the proxy serves that the next start could read it.
package guard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/etcdclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/logonce"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/periodic"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// Guard holds a proxy back until its rules were compared with the agreed ones.
type Guard struct {
	Fleet          *coordination.Fleet // nil with coordination off
	Client         *clientv3.Client
	Config         *config.Config
	AllowWeakening bool
	Open           func() // lets the proxy serve
	OpenLearner    func() // lets the proxy serve the calls that an etcd learner serves
	Audit          *auditlog.Log
	Logger         *slog.Logger
}

const (
	requestTimeout = 5 * time.Second
	retryInterval  = 250 * time.Millisecond
	// verifyWait is how long the start waits for a KMS that can verify the record. The rules are
	// compared in any case.
	verifyWait          = 3 * time.Second
	verifyRetryInterval = 10 * time.Second
)

// Run compares the rules and opens the proxy. It returns an error if the proxy must not serve, and
// nil when the decision is final or ctx has ended.
func (g *Guard) Run(ctx context.Context) error {
	found, err := g.read(ctx)
	for ; err == nil && found.learner && ctx.Err() == nil; found, err = g.read(ctx) {
		// The data of a learner may be outdated, and it accepts no write. So the proxy serves
		// reads, and decides once the member is promoted.
		if weaker := g.compare(found.agreed, found.others); weaker != nil && !g.AllowWeakening {
			return g.decide(weaker)
		}
		g.OpenLearner()
		_ = periodic.Wait(ctx, retryInterval) // the loop checks ctx
	}
	if ctx.Err() != nil {
		return nil
	}
	if upstream.IsChained(err) {
		return etcdclient.ErrChained
	}
	if why := etcdclient.CheckNotProxy(ctx, g.Config, g.Logger); why != nil {
		return why
	}
	if err == nil {
		err = g.compare(found.agreed, found.others)
	}
	if err != nil {
		if err = g.decide(err); err != nil {
			return err
		}
		g.Open()
		g.deleteRecords(ctx, found.others) // slow while etcd has no leader
		return nil
	}
	if found.agreed == nil {
		g.Open()
		return nil
	}
	return g.verify(ctx, found.agreed)
}

// records are the rules that proxies agreed on, under the configured prefix and under others.
type records struct {
	agreed  *coordination.Agreement
	others  []coordination.RecordLocation
	learner bool // read from a learner: what it has so far, or nothing if it requires a user
}

// read reads the record, however long it takes: without etcd there is nothing to serve. Without a
// record under the configured prefix, it reads those under other prefixes.
func (g *Guard) read(ctx context.Context) (records, error) {
	var logged logonce.State
	text, timeouts := "", 0
	for {
		limited, cancel := context.WithTimeout(ctx, requestTimeout)
		found, err := g.readOnce(limited)
		cancel()
		if err == nil || errors.Is(err, coordination.ErrForged) || upstream.IsChained(err) || ctx.Err() != nil {
			return found, err
		}
		if g.AllowWeakening && denied(err) {
			return found, &weakening{[]string{"etcd does not let it be read what rules the proxies agreed on: " + err.Error()}}
		}
		hint := "check etcd.endpoints, etcd.tls and etcd itself"
		switch {
		case denied(err):
			text, hint = err.Error(), deniedHint
		case !errors.Is(err, context.DeadlineExceeded):
			text = err.Error()
		default:
			// After one timeout, etcd may be about to start, and the log says if it cannot be
			// reached.
			if timeouts++; timeouts > 1 {
				text = "etcd does not respond in time: it may have no leader"
			}
		}
		if logged.Changed(text) {
			g.Logger.Warn("the proxy serves nothing until it has read from etcd what rules the proxies agreed on; it keeps trying", "error", text, "hint", hint)
		}
		if periodic.Wait(ctx, retryInterval) != nil {
			return records{}, nil
		}
	}
}

// deniedHint is the hint if etcd's authentication keeps the proxy from reading the record.
const deniedHint = "set etcd.username and etcd.passwordFile, also with coordination.enabled: false: that user must be able to read the keys below " + coordination.DefaultPrefix +
	"; or start the proxy with --allow-weakening, which serves without comparing the rules"

// readOnce reads once. From a learner, which serves serializable reads only, it reads what the
// learner has so far. It also does so from a member without a leader if coordination is off:
// clients may still make serializable reads there.
func (g *Guard) readOnce(ctx context.Context) (records, error) {
	limited, cancel := context.WithTimeout(ctx, requestTimeout/2)
	defer cancel()
	found, err := g.records(limited)
	learner := errors.Is(err, errLearner)
	if learner || g.Fleet == nil && err != nil && limited.Err() != nil {
		found, err = g.records(ctx, clientv3.WithSerializable())
		// it authenticates no user either
		if learner && (errors.Is(err, errLearner) || denied(err)) {
			found, err = records{}, nil
		}
		found.learner = learner
	}
	return found, err
}

// errLearner is how etcd's client reports that a learner refuses a request.
var errLearner = rpctypes.Error(rpctypes.ErrGRPCNotSupportedForLearner)

func (g *Guard) records(ctx context.Context, opts ...clientv3.OpOption) (records, error) {
	own := ""
	if g.Fleet != nil {
		own = g.Config.Coordination.Prefix
		if agreed, err := g.Fleet.Agreement(ctx, opts...); agreed != nil || err != nil {
			return records{agreed: agreed}, err
		}
	}
	others, err := coordination.OtherRecords(ctx, g.Client, own, opts...)
	return records{others: others}, err
}

// denied reports whether etcd's authentication keeps the proxy from reading.
func denied(err error) bool {
	return errors.Is(err, rpctypes.ErrPermissionDenied) || errors.Is(err, rpctypes.ErrUserEmpty) || errors.Is(err, rpctypes.ErrAuthFailed)
}

// weakening is an error that --allow-weakening permits.
type weakening struct{ reasons []string }

func (w *weakening) Error() string {
	return "the configuration protects keys less than what the proxies last agreed on: " + strings.Join(w.reasons, "; ")
}

// compare returns a weakening compared with the record, or with those under other prefixes.
func (g *Guard) compare(agreed *coordination.Agreement, others []coordination.RecordLocation) error {
	var because []string
	for _, p := range others {
		if g.Fleet == nil {
			because = append(because, fmt.Sprintf("coordination is off, and there is a record of rules below %q", p.Prefix))
		} else {
			because = append(because, fmt.Sprintf("coordination.prefix is %q, and the record of rules is below %q", g.Config.Coordination.Prefix, p.Prefix))
		}
		if p.Agreement != nil {
			found, _ := g.weakens(p.Agreement) // an unreadable one is a finding already
			because = append(because, found...)
		}
	}
	if agreed != nil {
		found, err := g.weakens(agreed)
		if err != nil {
			return err
		}
		because = append(because, found...)
	}
	if len(because) > 0 {
		return &weakening{because}
	}
	return nil
}

func (g *Guard) weakens(agreed *coordination.Agreement) ([]string, error) {
	was, a, err := parsePolicy(agreed.Policy)
	if err != nil {
		return nil, coordination.ErrForged
	}
	because := config.Weakens(was, g.Config.Rules)
	switch now := g.Config.Audit; {
	case a == nil:
	case now == nil:
		because = append(because, "there would be no audit log, which there was")
	case a.Required && !now.Required:
		because = append(because, "audit.required would be false, which was true")
	}
	return because, nil
}

// decide records the reason err, and returns nil if --allow-weakening permits it.
func (g *Guard) decide(err error) error {
	if g.AllowWeakening {
		g.Audit.Record(auditlog.Record{Event: auditlog.EventGuard, Outcome: "allowed", Reason: err.Error()})
		g.Logger.Warn("serving with less protection, as --allow-weakening permits", "because", err.Error())
		return nil
	}
	g.Audit.Record(auditlog.Record{Event: auditlog.EventGuard, Outcome: "refused", Reason: err.Error()})
	// the audit block may be what is missing
	g.Logger.Error("not serving: the guard refuses the configuration", "because", err.Error())
	hint := "restore the settings; or, if this is meant, start one proxy with --allow-weakening, and then the others"
	if errors.Is(err, coordination.ErrForged) {
		// Mostly the key is another one. With --allow-weakening the proxy would encrypt under a key
		// that decrypts nothing of what is stored.
		hint = "restore the key file, or the KMS key, that the values were encrypted with: etcd-kms-proxy status tells whether this one decrypts them. " +
			"If it does since you moved the values from a lost key to this one, see docs/guides/worst-day.md. " +
			"Otherwise the record was changed by someone else: see \"How the record is checked\" in docs/guides/restrict-settings.md"
	}
	return problem.WithHint(err, hint)
}

// deleteRecords removes the records that would stop the next start of a proxy that runs without
// coordination. With coordination, the next agreement replaces them.
func (g *Guard) deleteRecords(ctx context.Context, others []coordination.RecordLocation) {
	if g.Fleet != nil {
		return
	}
	for _, p := range others {
		limited, cancel := context.WithTimeout(ctx, requestTimeout)
		err := coordination.DeleteRecord(limited, g.Client, p)
		cancel()
		if err != nil {
			g.Logger.Warn("the next start needs --allow-weakening too: the record of the rules that the proxies agreed on cannot be removed", "error", err)
		}
	}
}

// verify opens the proxy once the record is verified, or once no KMS could verify it for a while;
// then it keeps trying.
func (g *Guard) verify(ctx context.Context, agreed *coordination.Agreement) error {
	was, _, err := parsePolicy(agreed.Policy)
	if err != nil {
		return g.decide(coordination.ErrForged)
	}
	providers := PolicyOf(was, nil).Providers
	begun, opened := time.Now(), false
	for {
		limited, cancel := context.WithTimeout(ctx, requestTimeout)
		_, err := g.Fleet.Verify(limited, agreed, providers)
		cancel()
		if errors.Is(err, coordination.ErrForged) {
			err = g.decide(err)
			if err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			g.Open()
			return nil
		}
		pause := retryInterval / 2
		if time.Since(begun) >= verifyWait {
			pause = verifyRetryInterval
			if !opened {
				g.Logger.Warn("no usable KMS key can verify the record of the rules that the proxies agreed on; the proxy trusts it for now and verifies it later")
				g.Open()
			}
			opened = true
		}
		if periodic.Wait(ctx, pause) != nil {
			return nil
		}
	}
}

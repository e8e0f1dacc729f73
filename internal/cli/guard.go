package cli

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
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// guard holds the proxy back until its rules were compared with those that the proxies agreed on in etcd.
type guard struct {
	fleet  *coordination.Fleet // nil with coordination off
	client *clientv3.Client
	config *config.Config
	allow  bool // --allow-weakening
	open   func()
	// learner lets those calls go on that a learner serves.
	learner func()
	audit   *auditor
	log     *slog.Logger
}

// Times of the guard.
const (
	guardTimeout = 5 * time.Second
	guardRetry   = 250 * time.Millisecond
	// proofPatience is how long the start waits for a KMS to prove the record; the rules are compared in any case.
	proofPatience = 3 * time.Second
	proofRetry    = 10 * time.Second
)

// run decides, and opens the proxy. It returns an error if the proxy must not serve, and nil when all is decided or ctx has ended.
func (g *guard) run(ctx context.Context) error {
	found, err := g.read(ctx)
	for ; err == nil && found.learner && ctx.Err() == nil; found, err = g.read(ctx) {
		// What a learner holds may be old, and it takes no write. So the proxy serves reads, and decides once the member is promoted.
		if weaker := g.compare(found.agreed, found.others); weaker != nil && !g.allow {
			return g.judge(weaker)
		}
		g.learner()
		select {
		case <-ctx.Done():
		case <-time.After(guardRetry):
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	if proxy.IsChained(err) {
		return chained()
	}
	if why := leadsToProxy(ctx, g.config, g.log); why != nil {
		return why
	}
	if err == nil {
		err = g.compare(found.agreed, found.others)
	}
	if err != nil {
		if err = g.judge(err); err != nil {
			return err
		}
		g.open()
		g.forget(ctx, found.others) // which takes a while where etcd has no leader
		return nil
	}
	if found.agreed == nil {
		g.open()
		return nil
	}
	return g.prove(ctx, found.agreed)
}

// records are what proxies have agreed on, here and at other places.
type records struct {
	agreed  *coordination.Agreement
	others  []coordination.RecordLocation
	learner bool // a learner was asked: it says what it has by now, or nothing where it needs a user
}

// read reads the record, however long it takes: without etcd there is nothing to serve. Where this proxy would look for none, or has none, it reads those of others.
func (g *guard) read(ctx context.Context) (records, error) {
	told, silent := "", 0
	for {
		limited, cancel := context.WithTimeout(ctx, guardTimeout)
		found, err := g.look(limited)
		cancel()
		if err == nil || errors.Is(err, coordination.ErrForged) || proxy.IsChained(err) || ctx.Err() != nil {
			return found, err
		}
		if g.allow && denied(err) {
			return found, &weakening{[]string{"etcd does not let it be read what rules the proxies agreed on: " + err.Error()}}
		}
		text, hint := err.Error(), "check etcd.endpoints, etcd.tls and etcd itself"
		switch {
		case denied(err):
			hint = deniedHint
		case errors.Is(err, context.DeadlineExceeded):
			// Once, etcd may be about to come, and the log says if it cannot be reached at all.
			if silent++; silent > 1 {
				text = "etcd does not answer in time: it may have no leader"
			} else {
				text = told
			}
		}
		if text != told {
			told = text
			g.log.Warn("the proxy serves nothing until it has read from etcd what rules the proxies agreed on; it keeps trying", "error", text, "hint", hint)
		}
		select {
		case <-ctx.Done():
			return records{}, nil
		case <-time.After(guardRetry):
		}
	}
}

// deniedHint is what to do where etcd's authentication keeps the proxy from reading the record.
const deniedHint = "set etcd.username and etcd.passwordFile, also with coordination.enabled: false: that user has to read below " + coordination.DefaultPrefix +
	"; or start the proxy with --allow-weakening, which serves without comparing the rules"

// look reads once. A learner, which answers nothing else, is asked for what it has by now. So is a member without a leader where coordination is off: its clients may
// still read from it what needs none.
func (g *guard) look(ctx context.Context) (records, error) {
	limited, cancel := context.WithTimeout(ctx, guardTimeout/2)
	defer cancel()
	found, err := g.records(limited)
	learner := errors.Is(err, errLearner)
	if learner || g.fleet == nil && err != nil && limited.Err() != nil {
		found, err = g.records(ctx, clientv3.WithSerializable())
		if learner && (errors.Is(err, errLearner) || denied(err)) { // it lets no user log in either
			found, err = records{}, nil
		}
		found.learner = learner
	}
	return found, err
}

// errLearner is how etcd's client reports a learner's refusal.
var errLearner = rpctypes.Error(rpctypes.ErrGRPCNotSupportedForLearner)

func (g *guard) records(ctx context.Context, opts ...clientv3.OpOption) (records, error) {
	own := ""
	if g.fleet != nil {
		own = g.config.Coordination.Prefix
		if agreed, err := g.fleet.Agreement(ctx, opts...); agreed != nil || err != nil {
			return records{agreed: agreed}, err
		}
	}
	others, err := coordination.OtherRecords(ctx, g.client, own, opts...)
	return records{others: others}, err
}

// denied reports whether etcd's authentication keeps the proxy from reading.
func denied(err error) bool {
	return errors.Is(err, rpctypes.ErrPermissionDenied) || errors.Is(err, rpctypes.ErrUserEmpty) || errors.Is(err, rpctypes.ErrAuthFailed)
}

// weakening is an error that --allow-weakening lets pass.
type weakening struct{ because []string }

func (w *weakening) Error() string {
	return "the configuration protects keys less than what the proxies last agreed on: " + strings.Join(w.because, "; ")
}

// compare returns a weakening of the record agreed, or of those at other places.
func (g *guard) compare(agreed *coordination.Agreement, others []coordination.RecordLocation) error {
	var because []string
	for _, p := range others {
		if g.fleet == nil {
			because = append(because, fmt.Sprintf("coordination is off, and there is a record of rules below %q", p.Prefix))
		} else {
			because = append(because, fmt.Sprintf("coordination.prefix is %q, and the record of rules is below %q", g.config.Coordination.Prefix, p.Prefix))
		}
		if p.Agreement != nil {
			found, _ := g.weakens(p.Agreement) // one that cannot be read is a finding already
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

func (g *guard) weakens(agreed *coordination.Agreement) ([]string, error) {
	was, a, err := parsePolicy(agreed.Policy)
	if err != nil {
		return nil, coordination.ErrForged
	}
	because := config.Weakens(was, g.config.Rules)
	switch now := g.config.Audit; {
	case a == nil:
	case now == nil:
		because = append(because, "there would be no audit log, which there was")
	case a.Required && !now.Required:
		because = append(because, "audit.required would be false, which was true")
	}
	return because, nil
}

// judge records what is wrong, and returns nil if it is allowed.
func (g *guard) judge(err error) error {
	if g.allow {
		g.audit.record(auditlog.Record{Event: auditlog.EventGuard, Outcome: "allowed", Reason: err.Error()})
		g.log.Warn("serving all the same, as --allow-weakening lets it", "because", err.Error())
		return nil
	}
	g.audit.record(auditlog.Record{Event: auditlog.EventGuard, Outcome: "refused", Reason: err.Error()})
	g.log.Error("not serving: the guard refuses the configuration", "because", err.Error()) // the audit block may be what is missing
	f := &failure{code: exitFailure, err: err, hint: "restore the settings; or, if this is meant, start one proxy with --allow-weakening, and then the others"}
	if errors.Is(err, coordination.ErrForged) {
		// Mostly it is the key that is another one. Who gets around that seals under a key that opens nothing of what is there.
		f.hint = "restore the key file, or the KMS key, that the values were sealed with: etcd-kms-proxy status tells whether this one opens them. " +
			"If it does, somebody has changed the record: see \"How the record is checked\" in docs/guides/restrict-settings.md"
	}
	return f
}

// forget removes what a proxy that is let do without coordination would be refused for again. With coordination, that is for the next agreement.
func (g *guard) forget(ctx context.Context, others []coordination.RecordLocation) {
	if g.fleet != nil {
		return
	}
	for _, p := range others {
		limited, cancel := context.WithTimeout(ctx, guardTimeout)
		err := coordination.DeleteRecord(limited, g.client, p)
		cancel()
		if err != nil {
			g.log.Warn("the next start needs --allow-weakening too: the record of the rules that the proxies agreed on cannot be removed", "error", err)
		}
	}
}

// prove opens the proxy once the record has proved genuine, or once no KMS could tell for a while; then it goes on trying.
func (g *guard) prove(ctx context.Context, agreed *coordination.Agreement) error {
	was, _, err := parsePolicy(agreed.Policy)
	if err != nil {
		return g.judge(coordination.ErrForged)
	}
	providers := policyOf(was, nil).Providers
	begun, opened := time.Now(), false
	for {
		limited, cancel := context.WithTimeout(ctx, guardTimeout)
		_, err := g.fleet.Verify(limited, agreed, providers)
		cancel()
		if errors.Is(err, coordination.ErrForged) {
			err = g.judge(err)
			if err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			g.open()
			return nil
		}
		pause := guardRetry / 2
		if time.Since(begun) >= proofPatience {
			pause = proofRetry
			if !opened {
				g.log.Warn("no KMS key is usable that could prove the record of the rules that the proxies agreed on; it is taken as it stands, and checked later")
				g.open()
			}
			opened = true
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

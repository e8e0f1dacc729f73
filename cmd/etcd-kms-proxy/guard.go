package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/audit"
)

// guard holds the proxy back until its rules were compared with those that the proxies agreed on in etcd.
type guard struct {
	fleet *lifecycle.Fleet
	rules []config.Rule
	allow bool // --allow-weakening
	open  func()
	audit *auditor
	log   *slog.Logger
}

// Times of the guard.
const (
	guardTimeout = 5 * time.Second
	guardRetry   = time.Second
	// proofPatience is how long the start waits for a KMS to prove the record; the rules are compared in any case.
	proofPatience = 3 * time.Second
	proofRetry    = 10 * time.Second
)

// policy is the form of rules that proxies compare. Its JSON is canonical: sorted, with every field.
type policy struct {
	Rules []policyRule `json:"rules"`
}

type policyRule struct {
	Prefix              string   `json:"prefix"`
	WriteWith           string   `json:"writeWith"`
	ReadWith            []string `json:"readWith"`
	Recovery            []string `json:"recovery"`
	AllowPlaintextReads bool     `json:"allowPlaintextReads"`
}

// policyOf returns the canonical form of rules and the providers that they seal with.
func policyOf(rules []config.Rule) (canonical []byte, providers []string) {
	p := policy{Rules: []policyRule{}}
	sorted := func(names []string) []string { return slices.Sorted(slices.Values(append([]string{}, names...))) }
	for _, r := range rules {
		p.Rules = append(p.Rules, policyRule{r.Prefix, r.WriteWith, sorted(r.ReadWith), sorted(r.Recovery), r.AllowPlaintextReads})
		if r.WriteWith != config.Plaintext && !slices.Contains(providers, r.WriteWith) {
			providers = append(providers, r.WriteWith)
		}
	}
	slices.SortFunc(p.Rules, func(a, b policyRule) int { return strings.Compare(a.Prefix, b.Prefix) })
	slices.Sort(providers)
	canonical, _ = json.Marshal(p) // strings and booleans do not fail
	return canonical, providers
}

// rulesOf is the inverse of policyOf, as far as it goes.
func rulesOfPolicy(canonical []byte) ([]config.Rule, error) {
	var p policy
	if err := json.Unmarshal(canonical, &p); err != nil {
		return nil, err
	}
	var rules []config.Rule
	for _, r := range p.Rules {
		rules = append(rules, config.Rule{
			Prefix: r.Prefix, WriteWith: r.WriteWith, ReadWith: r.ReadWith, Recovery: r.Recovery, AllowPlaintextReads: r.AllowPlaintextReads,
		})
	}
	return rules, nil
}

// run decides, and opens the proxy. It returns an error if the proxy must not serve, and nil when all is decided or ctx has ended.
func (g *guard) run(ctx context.Context) error {
	agreed, err := g.read(ctx)
	if ctx.Err() != nil {
		return nil
	}
	if proxy.IsChained(err) {
		return chained()
	}
	if err == nil && agreed != nil {
		err = g.compare(agreed)
	}
	if err != nil {
		if err = g.judge(err); err != nil {
			return err
		}
		g.open()
		return nil
	}
	if agreed == nil {
		g.open()
		return nil
	}
	return g.prove(ctx, agreed)
}

// read reads the record, however long it takes: without etcd there is nothing to serve.
func (g *guard) read(ctx context.Context) (*lifecycle.Agreement, error) {
	told := ""
	for {
		limited, cancel := context.WithTimeout(ctx, guardTimeout)
		agreed, err := g.fleet.Agreement(limited)
		cancel()
		if err == nil || errors.Is(err, lifecycle.ErrForged) || proxy.IsChained(err) || ctx.Err() != nil {
			return agreed, err
		}
		if text := err.Error(); text != told && !errors.Is(err, context.DeadlineExceeded) {
			told = text
			g.log.Warn("the proxy serves nothing until it has read from etcd what rules the proxies agreed on; it keeps trying", "error", text,
				"hint", "where etcd's authentication is on, set etcd.username; coordination.enabled: false does without")
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(guardRetry):
		}
	}
}

// weakening is an error that --allow-weakening lets pass.
type weakening struct{ because []string }

func (w *weakening) Error() string {
	return "the configuration protects keys less than what the proxies last agreed on: " + strings.Join(w.because, "; ")
}

func (g *guard) compare(agreed *lifecycle.Agreement) error {
	was, err := rulesOfPolicy(agreed.Policy)
	if err != nil {
		return lifecycle.ErrForged
	}
	if because := config.Weakens(was, g.rules); len(because) > 0 {
		return &weakening{because}
	}
	return nil
}

// judge records what is wrong, and returns nil if it is allowed.
func (g *guard) judge(err error) error {
	if g.allow {
		g.audit.record(audit.Record{Event: audit.EventGuard, Outcome: "allowed", Reason: err.Error()})
		g.log.Warn("serving all the same, as --allow-weakening lets it", "because", err.Error())
		return nil
	}
	g.audit.record(audit.Record{Event: audit.EventGuard, Outcome: "refused", Reason: err.Error()})
	f := &failure{code: exitFailure, err: err, hint: "restore the rules; or, if this is meant, start one proxy with --allow-weakening, and then the others"}
	if errors.Is(err, lifecycle.ErrForged) {
		// Mostly it is the key that is another one. Who gets around that seals under a key that opens nothing of what is there.
		f.hint = "restore the key file, or the KMS key, that the values were sealed with: etcd-kms-proxy status tells whether this one opens them. " +
			"If it does, somebody has changed the record: see \"How the record is checked\" in docs/coordination.md"
	}
	return f
}

// prove opens the proxy once the record has proved genuine, or once no KMS could tell for a while; then it goes on trying.
func (g *guard) prove(ctx context.Context, agreed *lifecycle.Agreement) error {
	was, err := rulesOfPolicy(agreed.Policy)
	if err != nil {
		return g.judge(lifecycle.ErrForged)
	}
	_, providers := policyOf(was)
	begun, opened := time.Now(), false
	for {
		limited, cancel := context.WithTimeout(ctx, guardTimeout)
		_, err := g.fleet.Check(limited, agreed, providers)
		cancel()
		if errors.Is(err, lifecycle.ErrForged) {
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
		pause := guardRetry / 10
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

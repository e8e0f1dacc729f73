package stored

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/etcdfile"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// undecided are values that were not decrypted for a reason that may be temporary. Whether they are
// findings is decided at the end: they are if the KMS is healthy, decrypts other values and does
// not unwrap the DEK seed; a KMS that does not respond says nothing about the value.
type undecided struct {
	rules     *inventory.Rules
	groups    map[string]*undecidedGroup // by the reason
	decrypted map[string]bool            // providers of which a value was decrypted
	beyond    int64                      // values beyond maxUndecidedGroups
}

// undecidedGroup is the values that were not decrypted for one reason, and one of them to try
// again.
type undecidedGroup struct {
	key, value []byte
	last       time.Time
	responded  bool
	count      int64
	findings   []etcdfile.Finding // the first
}

const (
	maxUndecidedGroups = 1000 // reasons of which a value is kept
	maxUndecrypted     = 100  // values listed for each
	// healthyWait is how long to wait for all KMS to be healthy: some plugins report an error for
	// half a minute after a failed call.
	healthyWait = 45 * time.Second
)

func newUndecided(rules *inventory.Rules) *undecided {
	return &undecided{rules: rules, groups: make(map[string]*undecidedGroup), decrypted: make(map[string]bool)}
}

// note notes the result of decrypting a value. It returns the reason that [undecided.claim] expects
// for a value that was not decrypted, or "".
func (d *undecided) note(key, value []byte, err *keyring.Error) (why string) {
	if err == nil {
		if provider, _, ok := envelope.Split(value); ok {
			d.decrypted[string(provider)] = true
		}
		return ""
	}
	why = "it begins like an encrypted value, and its KMS does not unwrap its DEK seed: " + err.OfSeed()
	if d.groups[why] == nil {
		if len(d.groups) >= maxUndecidedGroups {
			d.beyond++
			return ""
		}
		d.groups[why] = &undecidedGroup{key: bytes.Clone(key), value: bytes.Clone(value)}
	}
	d.groups[why].last, d.groups[why].responded = time.Now(), err.Responded()
	return why
}

// claim takes a finding about a value in doubt. It returns false for any other finding.
func (d *undecided) claim(f etcdfile.Finding) bool {
	g := d.groups[f.Why]
	if g == nil {
		return false
	}
	if g.count++; len(g.findings) < maxUndecrypted {
		g.findings = append(g.findings, f)
	}
	return true
}

// decide waits until the KMS of each group is healthy, tries one of its values again, and calls
// found or undecrypted for those that are not decrypted.
func (d *undecided) decide(ctx context.Context, found, undecrypted func(f etcdfile.Finding, count int64)) {
	ctx, cancel := context.WithTimeout(ctx, healthyWait)
	defer cancel()
	for _, why := range slices.Sorted(maps.Keys(d.groups)) {
		g := d.groups[why]
		report, rule := undecrypted, d.rules.Of(g.key)
		if rule != nil && g.responded && d.decrypted[providerOf(g.value)] && g.healthy(ctx, rule) {
			_, _, err := rule.Sealer.Inspect(ctx, g.key, g.value)
			e, ok := errors.AsType[*keyring.Error](err)
			switch {
			case err == nil:
				continue
			case ok && e.Kind == keyring.Unavailable && !e.Responded():
			default:
				report = found
			}
		}
		for i, f := range g.findings {
			n := int64(1)
			if i == len(g.findings)-1 {
				n = g.count - int64(i)
			}
			report(f, n)
		}
	}
	if d.beyond > 0 {
		undecrypted(etcdfile.Finding{File: "other values", Offset: -1, Why: "its KMS does not unwrap its DEK seed, for one reason of too many"}, d.beyond)
	}
}

// healthy waits until the KMS of the values, which are under rule, is healthy after it last did not
// unwrap the DEK seed.
func (g *undecidedGroup) healthy(ctx context.Context, rule *inventory.Rule) bool {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if state, ok := rule.Sealer.Recheck(g.value); !ok || state.Revoked || state.LastGood.After(g.last) {
			return ok
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

func providerOf(value []byte) string {
	provider, _, _ := envelope.Split(value)
	return string(provider)
}

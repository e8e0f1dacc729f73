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

// doubts are values that were not decrypted for a reason that may be temporary. Whether they are
// findings is decided at the end: they are if the KMS is healthy, decrypts other values and does
// not unwrap the DEK seed; a KMS that does not respond says nothing about the value.
type doubts struct {
	rules  *inventory.Rules
	open   map[string]*doubt // by the reason
	opened map[string]bool   // providers of which a value was decrypted
	beyond int64             // values beyond maxDoubts
}

// doubt is the values that were not decrypted for one reason, and one of them to try again.
type doubt struct {
	key, value []byte
	last       time.Time
	responded  bool
	count      int64
	findings   []etcdfile.Finding // the first
}

const (
	maxDoubts      = 1000 // reasons of which a value is kept
	maxUndecrypted = 100  // values listed for each
	// doubtWait: for each KMS to be healthy: some plugins report an error for half a minute after a
	// failed call
	doubtWait = 45 * time.Second
)

func newDoubts(rules *inventory.Rules) *doubts {
	return &doubts{rules: rules, open: make(map[string]*doubt), opened: make(map[string]bool)}
}

// inspected notes the result of decrypting a value. It returns the reason that [doubts.take]
// expects for a value that was not decrypted, or "".
func (d *doubts) inspected(key, value []byte, err *keyring.Error) (why string) {
	if err == nil {
		if provider, _, ok := envelope.Split(value); ok && !d.opened[string(provider)] {
			d.opened[string(provider)] = true
		}
		return ""
	}
	why = "it begins like an encrypted value, and its KMS does not unwrap its DEK seed: " + err.OfSeed()
	if d.open[why] == nil {
		if len(d.open) >= maxDoubts {
			d.beyond++
			return ""
		}
		d.open[why] = &doubt{key: bytes.Clone(key), value: bytes.Clone(value)}
	}
	d.open[why].last, d.open[why].responded = time.Now(), err.Responded()
	return why
}

// take takes a finding about a value in doubt. It returns false for any other finding.
func (d *doubts) take(f etcdfile.Finding) bool {
	in := d.open[f.Why]
	if in == nil {
		return false
	}
	if in.count++; len(in.findings) < maxUndecrypted {
		in.findings = append(in.findings, f)
	}
	return true
}

// decide waits until the KMS of each doubt is healthy, tries one of its values again, and calls
// found or undecrypted for those that are not decrypted.
func (d *doubts) decide(ctx context.Context, found, undecrypted func(f etcdfile.Finding, count int64)) {
	ctx, cancel := context.WithTimeout(ctx, doubtWait)
	defer cancel()
	for _, why := range slices.Sorted(maps.Keys(d.open)) {
		in := d.open[why]
		report := undecrypted
		healthy := in.responded && d.opened[providerOf(in.value)] && d.healthy(ctx, in)
		if rule := d.rules.Of(in.key); healthy && rule != nil {
			_, _, err := rule.Sealer.Inspect(ctx, in.key, in.value)
			e, ok := errors.AsType[*keyring.Error](err)
			switch {
			case err == nil:
				continue
			case ok && e.Kind == keyring.Unavailable && !e.Responded():
			default:
				report = found
			}
		}
		for i, f := range in.findings {
			n := int64(1)
			if i == len(in.findings)-1 {
				n = in.count - int64(i)
			}
			report(f, n)
		}
	}
	if d.beyond > 0 {
		undecrypted(etcdfile.Finding{File: "other values", Offset: -1, Why: "its KMS does not unwrap its DEK seed, for one reason of too many"}, d.beyond)
	}
}

// healthy waits until the KMS of a value is healthy after it last did not unwrap the DEK seed.
func (d *doubts) healthy(ctx context.Context, in *doubt) bool {
	rule := d.rules.Of(in.key)
	if rule == nil {
		return false
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if state, ok := rule.Sealer.Recheck(in.value); !ok || state.Revoked || state.LastGood.After(in.last) {
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

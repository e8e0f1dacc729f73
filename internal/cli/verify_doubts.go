package cli

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

// doubts are the values that were not decrypted for a reason that may pass. Whether they are
// findings is decided at the end: a KMS that is well, has decrypted others and does not unwrap a
// value's DEK seed is one; a KMS that is out of reach says nothing of the value.
type doubts struct {
	rules  *inventory.Rules
	open   map[string]*doubt // by the reason
	opened map[string]bool   // providers of which a value was decrypted
	beyond int64             // values beyond maxDoubts
}

// doubt is values that were not decrypted for one reason, and one of them to try again.
type doubt struct {
	key, value []byte
	last       time.Time
	answered   bool
	count      int64
	findings   []etcdfile.Finding // the first
}

const (
	maxDoubts   = 1000             // reasons of which a value is kept
	maxUnopened = 100              // values named for each
	doubtWait   = 45 * time.Second // for each KMS to be well: some plugins report a fault for half a minute after each call that failed
)

func newDoubts(rules *inventory.Rules) *doubts {
	return &doubts{rules: rules, open: make(map[string]*doubt), opened: make(map[string]bool)}
}

// inspected takes note of how a value was decrypted. It returns the reason by which [doubts.take]
// knows a value that was not, or "".
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
	d.open[why].last, d.open[why].answered = time.Now(), err.Answered()
	return why
}

// take takes what was found of a value in doubt. It returns false for any other finding.
func (d *doubts) take(f etcdfile.Finding) bool {
	in := d.open[f.Why]
	if in == nil {
		return false
	}
	if in.count++; len(in.findings) < maxUnopened {
		in.findings = append(in.findings, f)
	}
	return true
}

// decide waits for the KMS of what is in doubt to be well, tries a value of each kind again, and
// tells found or unopened of those that are not decrypted.
func (d *doubts) decide(ctx context.Context, found, unopened func(f etcdfile.Finding, count int64)) {
	ctx, cancel := context.WithTimeout(ctx, doubtWait)
	defer cancel()
	for _, why := range slices.Sorted(maps.Keys(d.open)) {
		in := d.open[why]
		tell := unopened
		well := in.answered && d.opened[providerOf(in.value)] && d.well(ctx, in)
		if rule := d.rules.Of(in.key); well && rule != nil {
			_, _, err := rule.Sealer.Inspect(ctx, in.key, in.value)
			e, ok := errors.AsType[*keyring.Error](err)
			switch {
			case err == nil:
				continue
			case ok && e.Kind == keyring.Unavailable && !e.Answered():
			default:
				tell = found
			}
		}
		for i, f := range in.findings {
			n := int64(1)
			if i == len(in.findings)-1 {
				n = in.count - int64(i)
			}
			tell(f, n)
		}
	}
	if d.beyond > 0 {
		unopened(etcdfile.Finding{Offset: -1, Why: "its KMS does not unwrap its DEK seed, for one reason of too many"}, d.beyond)
	}
}

// well waits until the KMS of a value is well after it last did not unwrap its seed.
func (d *doubts) well(ctx context.Context, in *doubt) bool {
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

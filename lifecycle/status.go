package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// Unavailable is the standing of a value that would have to be opened to be judged while its KMS does not answer.
const Unavailable keyring.Standing = "unavailable"

// Standings are all standings, in the order of reports.
var Standings = []keyring.Standing{keyring.Current, keyring.Stale, keyring.Unsealed, keyring.Foreign, keyring.Undecryptable, Unavailable}

// Count is a number of keys.
type Count struct {
	Keys   int64 `json:"keys"`
	Bytes  int64 `json:"bytes"`            // of their values, as stored
	Oldest int64 `json:"oldest,omitempty"` // the least and the greatest of the revisions that wrote them; 0 if there is none
	Newest int64 `json:"newest,omitempty"`
}

func (c *Count) add(kv *mvccpb.KeyValue) {
	c.Keys++
	c.Bytes += int64(len(kv.Value))
	c.Newest = max(c.Newest, kv.ModRevision)
	if c.Oldest == 0 || kv.ModRevision < c.Oldest {
		c.Oldest = kv.ModRevision
	}
}

// KeyCount is how many values a KMS key has sealed.
type KeyCount struct {
	Provider string `json:"provider"` // "", like KeyID, beyond a thousand of a rule
	KeyID    string `json:"keyID"`    // "" for what is too damaged to tell
	Count
}

// RuleCount is how the keys of one rule stand.
type RuleCount struct {
	Prefix    string                      `json:"prefix"`
	WriteWith string                      `json:"writeWith"`
	All       Count                       `json:"all"`
	Standings map[keyring.Standing]*Count `json:"standings"`
	Sealed    []KeyCount                  `json:"sealed"` // by provider and key ID
}

// Done reports whether every value is as its rule writes it.
func (r *RuleCount) Done() bool { return r.All.Keys == r.Standings[keyring.Current].Keys }

// What values, which others may have written, can make a report hold is bounded.
const (
	maxKeyIDs   = 1000
	maxProvider = 256
)

// Looker is called with each key and what its value is to its rule. err says why for Undecryptable and Unavailable. It keeps no argument.
type Looker func(rule *Rule, kv *mvccpb.KeyValue, standing keyring.Standing, err error) error

// Survey looks at every value under rules in etcd, at one revision, and counts them per rule. look may be nil. It takes memory for one page, and does not stop at
// values that do not open.
func Survey(ctx context.Context, kv clientv3.KV, rules *Rules, look Looker) ([]RuleCount, Span, error) {
	counts := make(map[*Rule]*tally)
	for i := range rules.list {
		counts[&rules.list[i]] = newTally()
	}
	span, err := Scan(ctx, kv, rules.Prefixes(), 0, func(kv *mvccpb.KeyValue) error {
		rule := rules.Of(kv.Key)
		if rule == nil {
			return nil
		}
		standing, err := inspect(ctx, rule, kv)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		counts[rule].add(kv, standing)
		if look != nil {
			return look(rule, kv, standing, err)
		}
		return nil
	})
	if err != nil {
		return nil, span, err
	}
	var all []RuleCount
	for i := range rules.list {
		all = append(all, counts[&rules.list[i]].count(&rules.list[i]))
	}
	slices.SortFunc(all, func(a, b RuleCount) int { return cmp.Compare(a.Prefix, b.Prefix) })
	return all, span, nil
}

// inspect tells what a value is to its rule.
func inspect(ctx context.Context, rule *Rule, kv *mvccpb.KeyValue) (keyring.Standing, error) {
	_, standing, err := rule.Sealer.Inspect(ctx, kv.Key, kv.Value)
	if e, ok := errors.AsType[*keyring.Error](err); ok && e.Kind == keyring.Unavailable {
		standing = Unavailable
	}
	return standing, err
}

type tally struct {
	all       Count
	standings map[keyring.Standing]*Count
	sealed    map[[2]string]*Count // by provider and key ID
}

func newTally() *tally {
	t := &tally{standings: make(map[keyring.Standing]*Count), sealed: make(map[[2]string]*Count)}
	for _, s := range Standings {
		t.standings[s] = &Count{}
	}
	return t
}

func (t *tally) add(kv *mvccpb.KeyValue, standing keyring.Standing) {
	t.all.add(kv)
	t.standings[standing].add(kv)
	provider, object, ok := envelope.Split(kv.Value)
	if !ok {
		return
	}
	by := [2]string{string(provider)}
	if o, err := envelope.Parse(object); err == nil {
		by[1] = strings.Clone(o.KeyID) // not the whole page
	}
	if len(by[0]) > maxProvider {
		by = [2]string{}
	}
	c := t.sealed[by]
	if c == nil && len(t.sealed) >= maxKeyIDs {
		by = [2]string{}
		c = t.sealed[by]
	}
	if c == nil {
		c = &Count{}
		t.sealed[by] = c
	}
	c.add(kv)
}

func (t *tally) count(r *Rule) RuleCount {
	rc := RuleCount{Prefix: r.Prefix, WriteWith: r.WriteWith, All: t.all, Standings: t.standings, Sealed: []KeyCount{}}
	for _, by := range slices.SortedFunc(maps.Keys(t.sealed), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		rc.Sealed = append(rc.Sealed, KeyCount{Provider: by[0], KeyID: by[1], Count: *t.sealed[by]})
	}
	return rc
}

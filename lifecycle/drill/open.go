package drill

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// Count counts the values of a rule or of a group.
type Count struct {
	Values int64 `json:"values"`
	Bytes  int64 `json:"bytes"` // of the values, as stored
	// Readable values decrypted, or are plaintext, which Plaintext counts too.
	Readable  int64 `json:"readable"`
	Plaintext int64 `json:"plaintext"`
	// Missing values do not decrypt with the keys that are left.
	Missing int64 `json:"missing"`
	// Unavailable values might decrypt: the KMS that is left did not respond.
	Unavailable int64 `json:"unavailable"`
	// Untried values are not in the sample.
	Untried int64 `json:"untried"`
}

// Add adds other counts.
func (c *Count) Add(o Count) {
	c.Values += o.Values
	c.Bytes += o.Bytes
	c.Readable += o.Readable
	c.Plaintext += o.Plaintext
	c.Missing += o.Missing
	c.Unavailable += o.Unavailable
	c.Untried += o.Untried
}

// Rule is the result for the values of a rule.
type Rule struct {
	Prefix    string `json:"prefix"`
	WriteWith string `json:"writeWith"`
	Count
	Groups []Group `json:"groups"`
}

// Group is the result for those values of a rule that one KMS key has encrypted.
type Group struct {
	// Provider is "" for plaintext, and for groups beyond the first thousand of a rule. KeyID is ""
	// for these, and for values that are too damaged to tell.
	Provider string `json:"provider"`
	KeyID    string `json:"keyID"`
	Count
	// Copies are the providers of the recovery copies in the values, and how many values have each.
	Copies map[string]int64 `json:"copies"`
	// Reasons say why values are missing or unavailable: the first of them.
	Reasons []Reason `json:"reasons"`
}

// Reason is why values are missing or unavailable.
type Reason struct {
	Text   string `json:"text"` // never of a value
	Values int64  `json:"values"`
	// Example is the key of the first of them.
	Example string `json:"example"`
	// ExampleBytes is Example if that is not valid UTF-8.
	ExampleBytes []byte `json:"exampleBytes,omitempty"`
}

// Limits of a report, since anyone may have written the values.
const (
	maxGroups  = 1000
	maxReasons = 20
	maxName    = 256
)

// Options say what to open.
type Options struct {
	// Sample is how many values of each KMS key of a rule are decrypted, at random; 0: all of them.
	Sample int
	// Left is called with each value that did not decrypt, and may be nil. It does not keep its
	// arguments.
	Left func(kv *mvccpb.KeyValue, state keyring.ValueState, why string)
}

// Open decrypts the values of an etcd that nothing else writes to, and counts what it could
// decrypt. It returns the revision at which it read. The error is of etcd or of ctx. What does not
// decrypt is in the result.
func Open(ctx context.Context, kv clientv3.KV, rules *inventory.Rules, o Options) ([]Rule, int64, error) {
	run := &opening{options: o, inspector: inventory.NewInspector(), groups: make(map[*inventory.Rule]map[encryptedBy]*tally)}
	span, err := inventory.Scan(ctx, kv, rules.Prefixes(), 0, func(kv *mvccpb.KeyValue) error {
		rule := rules.Of(kv.Key)
		if rule == nil {
			return nil
		}
		g := run.group(rule, kv)
		g.Values++
		g.Bytes += int64(len(kv.Value))
		if o.Sample == 0 {
			return run.open(ctx, rule, g, kv)
		}
		g.Untried++
		g.choose(o.Sample, string(kv.Key))
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	for rule, groups := range run.groups {
		for _, g := range groups {
			if err := run.openSample(ctx, kv, rule, g, span.Last); err != nil {
				return nil, 0, err
			}
		}
	}
	return run.result(rules), span.Last, nil
}

// opening is one call of [Open].
type opening struct {
	options   Options
	inspector *inventory.Inspector
	groups    map[*inventory.Rule]map[encryptedBy]*tally
}

type encryptedBy struct{ provider, keyID string }

// tally is a [Group] in the making.
type tally struct {
	Group
	sample []string // keys
	seen   int
}

// choose keeps n of the keys that it is called with, each with the same probability.
func (t *tally) choose(n int, key string) {
	t.seen++
	if len(t.sample) < n {
		t.sample = append(t.sample, key)
		return
	}
	if i := rand.IntN(t.seen); i < n { //nolint:gosec // which values a drill tries is no secret
		t.sample[i] = key
	}
}

// group returns the group of a value, and counts its recovery copies.
func (r *opening) group(rule *inventory.Rule, kv *mvccpb.KeyValue) *tally {
	groups := r.groups[rule]
	if groups == nil {
		groups = make(map[encryptedBy]*tally)
		r.groups[rule] = groups
	}
	by, copies := headerOf(kv.Value, rule.KeyNames)
	g := groups[by]
	if g == nil && len(groups) >= maxGroups {
		by = encryptedBy{}
		g = groups[by]
	}
	if g == nil {
		g = &tally{Group: Group{Provider: by.provider, KeyID: by.keyID, Copies: map[string]int64{}, Reasons: []Reason{}}}
		groups[by] = g
	}
	for _, name := range copies {
		if _, ok := g.Copies[name]; ok || len(g.Copies) < maxReasons {
			g.Copies[name]++
		}
	}
	return g
}

// headerOf returns the provider and the key ID in a stored value, and the providers of its recovery
// copies. names are those of the API server's own keys.
func headerOf(stored []byte, names []string) (by encryptedBy, copies []string) {
	provider, object, ok := envelope.Split(stored)
	if !ok {
		by.provider, by.keyID, _ = inventory.KubernetesKey(stored, names)
		return by, nil
	}
	if len(provider) > maxName {
		return by, nil
	}
	by.provider = string(provider)
	o, err := envelope.Parse(object)
	if err != nil {
		return by, nil
	}
	by.keyID = strings.Clone(o.KeyID) // not the whole page
	for annotation := range o.Annotations {
		if name, ok := envelope.RecoveryProvider(annotation); ok {
			copies = append(copies, strings.Clone(name))
		}
	}
	return by, copies
}

// openSample decrypts the sample of a group.
func (r *opening) openSample(ctx context.Context, kv clientv3.KV, rule *inventory.Rule, g *tally, revision int64) error {
	for _, key := range g.sample {
		got, err := kv.Get(ctx, key, clientv3.WithRev(revision))
		if err != nil {
			return err
		}
		for _, kv := range got.Kvs {
			g.Untried--
			if err := r.open(ctx, rule, g, kv); err != nil {
				return err
			}
		}
	}
	return nil
}

// open decrypts one value.
func (r *opening) open(ctx context.Context, rule *inventory.Rule, g *tally, kv *mvccpb.KeyValue) error {
	state, err := r.inspector.Inspect(ctx, rule, kv)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// Under a rule that writes plaintext, plaintext is current.
	_, _, encrypted := envelope.Split(kv.Value)
	var why string
	switch state {
	case keyring.Unencrypted, keyring.Current, keyring.Stale:
		g.Readable++
		if !encrypted && (state == keyring.Unencrypted || rule.WriteWith == inventory.Plaintext && state == keyring.Current) {
			g.Plaintext++
		}
		return nil
	case inventory.Unavailable:
		g.Unavailable++
		why = reasonOf(err)
	case keyring.Foreign:
		g.Missing++
		why = "the rule does not read values of its provider"
	default:
		g.Missing++
		why = reasonOf(err)
	}
	g.noteReason(why, kv.Key)
	if r.options.Left != nil {
		r.options.Left(kv, state, why)
	}
	return nil
}

// reasonOf returns the text of an error without the etcd key, so that it is the same for many
// values.
func reasonOf(err error) string {
	if e, ok := errors.AsType[*keyring.Error](err); ok {
		return e.OfSeed()
	}
	return "it was not decrypted"
}

// noteReason counts a value that was not decrypted.
func (t *tally) noteReason(why string, key []byte) {
	i := slices.IndexFunc(t.Reasons, func(r Reason) bool { return r.Text == why })
	if i < 0 {
		if len(t.Reasons) == maxReasons {
			return
		}
		i, t.Reasons = len(t.Reasons), append(t.Reasons, Reason{Text: why, Example: string(key), ExampleBytes: inventory.KeyBytes(string(key))})
	}
	t.Reasons[i].Values++
}

// result returns the results of all rules by prefix, also of those without values.
func (r *opening) result(rules *inventory.Rules) []Rule {
	var all []Rule
	list := rules.All()
	for i := range list {
		out := Rule{Prefix: list[i].Prefix, WriteWith: list[i].WriteWith, Groups: []Group{}}
		for _, g := range r.groups[&list[i]] {
			out.Add(g.Count)
			out.Groups = append(out.Groups, g.Group)
		}
		slices.SortFunc(out.Groups, func(a, b Group) int {
			return cmp.Or(cmp.Compare(a.Provider, b.Provider), cmp.Compare(a.KeyID, b.KeyID))
		})
		all = append(all, out)
	}
	slices.SortFunc(all, func(a, b Rule) int { return cmp.Compare(a.Prefix, b.Prefix) })
	return all
}

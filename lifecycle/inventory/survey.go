package inventory

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
)

// Unavailable is the state of a value whose DEK seed could not be unwrapped: the KMS does not
// respond, or refuses for a reason that does not say whether it is permanent.
const Unavailable keyring.ValueState = "unavailable"

// States are all states, in the order of reports.
var States = []keyring.ValueState{keyring.Current, keyring.Stale, keyring.Unencrypted, keyring.Foreign, keyring.Undecryptable, Unavailable}

// Count counts keys and the bytes of their values.
type Count struct {
	Keys  int64 `json:"keys"`
	Bytes int64 `json:"bytes"` // of their values, as stored
	// the least and the greatest of the revisions that wrote them; 0 if there is none
	Oldest int64 `json:"oldest,omitempty"`
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

// KeyCount counts the values of one state that one KMS key has encrypted, or that are plaintext.
type KeyCount struct {
	State keyring.ValueState `json:"state"`
	// or aescbc, aesgcm, secretbox; [Plaintext] for plaintext; "", like KeyID, beyond a thousand of
	// a rule
	Provider string `json:"provider"`
	// "" for plaintext and for values that are too damaged
	KeyID string `json:"keyID"`
	Count
}

// RuleCount counts the values of one rule by state.
type RuleCount struct {
	Prefix    string                        `json:"prefix"`
	WriteWith string                        `json:"writeWith"`
	All       Count                         `json:"all"`
	States    map[keyring.ValueState]*Count `json:"states"`
	// by state, in their order, provider and key ID
	Keys []KeyCount `json:"keys"`
}

// Done reports whether every value is stored as its rule requires.
func (r *RuleCount) Done() bool { return r.All.Keys == r.States[keyring.Current].Keys }

// Values may come from untrusted clients. These limits bound the size of a report.
const (
	maxKeyIDs   = 1000
	maxProvider = 256
)

// KeyBytes returns the bytes of an etcd key that is not valid UTF-8, and nil for other keys. JSON
// replaces invalid bytes, so reports contain the bytes in addition to the text.
func KeyBytes(key string) []byte {
	if utf8.ValidString(key) {
		return nil
	}
	return []byte(key)
}

// Visitor is called with each key and the state of its value. err is the reason for Undecryptable
// and Unavailable. It must not keep its arguments.
type Visitor func(rule *Rule, kv *mvccpb.KeyValue, state keyring.ValueState, err error) error

// Survey reads every value under rules at one revision, and counts the values by rule and state.
// visit may be nil. Survey needs memory for one page. It continues after values that cannot be
// decrypted.
func Survey(ctx context.Context, kv clientv3.KV, rules *Rules, visit Visitor) ([]RuleCount, Span, error) {
	counts, inspector := make(map[*Rule]*tally), NewInspector()
	for i := range rules.list {
		counts[&rules.list[i]] = newTally(rules.list[i].KeyNames)
	}
	span, err := Scan(ctx, kv, rules.Prefixes(), 0, func(kv *mvccpb.KeyValue) error {
		rule := rules.Of(kv.Key)
		if rule == nil {
			return nil
		}
		state, err := inspector.Inspect(ctx, rule, kv)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		counts[rule].add(kv, state)
		if visit != nil {
			return visit(rule, kv, state, err)
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

// inspect returns the state of a value under its rule.
func inspect(ctx context.Context, rule *Rule, kv *mvccpb.KeyValue) (keyring.ValueState, error) {
	_, state, err := rule.Sealer.Inspect(ctx, kv.Key, kv.Value)
	if e, ok := errors.AsType[*keyring.Error](err); ok && (e.Kind == keyring.Unavailable || e.Responded()) {
		state = Unavailable
	}
	return state, err
}

// Inspector returns the states of values. It remembers for a short time which DEK seeds could not
// be unwrapped, so that a slow KMS is not called for each of their values. It is not safe for
// concurrent use.
type Inspector struct{ failed map[SeedID]seedFailure }

type seedFailure struct {
	err   error
	until time.Time
}

const (
	seedMemoFor = time.Second
	maxSeedMemo = 1000
)

// NewInspector returns an Inspector that remembers nothing yet.
func NewInspector() *Inspector { return &Inspector{failed: make(map[SeedID]seedFailure)} }

// Inspect returns the state of a value under its rule, and the reason for
// [keyring.Undecryptable] and [Unavailable].
func (m *Inspector) Inspect(ctx context.Context, rule *Rule, kv *mvccpb.KeyValue) (keyring.ValueState, error) {
	if len(m.failed) > 0 {
		seed, _, _ := SeedOf(rule, kv.Value)
		if f, ok := m.failed[seed]; ok && time.Now().Before(f.until) {
			return Unavailable, f.err
		}
	}
	state, err := inspect(ctx, rule, kv)
	if state != Unavailable {
		return state, err
	}
	if seed, _, ok := SeedOf(rule, kv.Value); ok {
		if len(m.failed) >= maxSeedMemo {
			clear(m.failed)
		}
		m.failed[seed] = seedFailure{err, time.Now().Add(seedMemoFor)}
	}
	return state, err
}

type tally struct {
	names  []string // see [Rule.KeyNames]
	all    Count
	states map[keyring.ValueState]*Count
	keys   map[encryptedBy]*Count
}

type encryptedBy struct {
	state           keyring.ValueState
	provider, keyID string
}

func newTally(names []string) *tally {
	t := &tally{names: names, states: make(map[keyring.ValueState]*Count), keys: make(map[encryptedBy]*Count)}
	for _, s := range States {
		t.states[s] = &Count{}
	}
	return t
}

func (t *tally) add(kv *mvccpb.KeyValue, state keyring.ValueState) {
	t.all.add(kv)
	t.states[state].add(kv)
	by := encryptedBy{state: state, provider: Plaintext}
	if provider, object, ok := envelope.Split(kv.Value); ok {
		by.provider = string(provider)
		if o, err := envelope.Parse(object); err == nil {
			by.keyID = strings.Clone(o.KeyID) // not the whole page
		}
		if len(provider) > maxProvider {
			by = encryptedBy{state: state}
		}
	} else if kind, name, ok := KubernetesKey(kv.Value, t.names); ok && state != keyring.Unencrypted {
		by.provider, by.keyID = kind, name
	}
	c := t.keys[by]
	if c == nil && len(t.keys) >= maxKeyIDs {
		by = encryptedBy{state: state}
		c = t.keys[by]
	}
	if c == nil {
		c = &Count{}
		t.keys[by] = c
	}
	c.add(kv)
}

// KubernetesKey returns the provider and the key name of a value that the API server encrypted
// itself: k8s:enc:<kind>:v1:<key name>:<payload>.
func KubernetesKey(value []byte, known []string) (kind, name string, ok bool) {
	if t, name, ok := kubelegacy.KeyName(value, known); ok {
		return string(t), name, true
	}
	rest, ok := strings.CutPrefix(string(value[:min(len(value), maxProvider)]), "k8s:enc:")
	parts := strings.SplitN(rest, ":", 4)
	if !ok || len(parts) < 4 {
		return "", "", false
	}
	return parts[0], parts[2], true
}

func (t *tally) count(r *Rule) RuleCount {
	rc := RuleCount{Prefix: r.Prefix, WriteWith: r.WriteWith, All: t.all, States: t.states, Keys: []KeyCount{}}
	for by, c := range t.keys {
		rc.Keys = append(rc.Keys, KeyCount{State: by.state, Provider: by.provider, KeyID: by.keyID, Count: *c})
	}
	slices.SortFunc(rc.Keys, func(a, b KeyCount) int {
		return cmp.Or(cmp.Compare(slices.Index(States, a.State), slices.Index(States, b.State)), cmp.Compare(a.Provider, b.Provider), cmp.Compare(a.KeyID, b.KeyID))
	})
	return rc
}

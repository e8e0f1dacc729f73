package reencrypt

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

func sizes(parts [][]*item) (all []int) {
	for _, p := range parts {
		all = append(all, len(p))
	}
	return all
}

func values(sizes ...int) (items []*item) {
	for n, size := range sizes {
		items = append(items, &item{key: fmt.Sprint(n), value: make([]byte, size)})
	}
	return items
}

func TestBatches(t *testing.T) {
	t.Parallel()
	const kib = 1 << 10
	for name, test := range map[string]struct {
		keys, bytes int
		items       []*item
		want        []int
	}{
		"none":                {10, 1 << 20, nil, nil},
		"one at a time":       {1, 1 << 20, values(1, 2, 3), []int{1, 1, 1}},
		"as many as allowed":  {2, 1 << 20, values(0, 0, 0, 0, 0), []int{2, 2, 1}},
		"as large as allowed": {100, 100 * kib, values(40*kib, 40*kib, 40*kib, 1), []int{2, 2}},
		"too large stands alone": {
			100, 100 * kib, values(1, 200*kib, 1, 1), []int{1, 1, 2},
		},
		"no more than is good for others": {1000, 100 << 20, values(slices.Repeat([]int{100 * kib}, 12)...), []int{5, 5, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			var l limits
			l.set(test.keys, test.bytes)
			if got := sizes(l.parts(test.items)); !slices.Equal(got, test.want) {
				t.Errorf("parts of %v, want %v", got, test.want)
			}
		})
	}
}

func TestLimitsOnlyFall(t *testing.T) {
	t.Parallel()
	var l limits
	l.set(100, 1<<20)
	l.fewerKeys(40)
	l.fewerKeys(60) // of a transaction that was under way
	if got := l.maxKeys(); got != 20 {
		t.Errorf("%d keys, want 20", got)
	}
	for range 10 {
		l.fewerKeys(l.maxKeys())
		l.fewerBytes(int(l.bytes.Load()))
	}
	if l.maxKeys() != 1 || l.bytes.Load() < 1 {
		t.Errorf("%d keys, %d bytes", l.maxKeys(), l.bytes.Load())
	}
}

// TestPace: it falls while etcd is slow, not without end, and rises again.
func TestPace(t *testing.T) {
	t.Parallel()
	for _, most := range []float64{0, 150} {
		synctest.Test(t, func(t *testing.T) {
			var told []bool
			p := newPace(most, 1, func(slow bool) { told = append(told, slow) })
			run := func(took time.Duration, txns int) {
				for range txns {
					if err := p.wait(t.Context(), 1); err != nil {
						t.Fatal(err)
					}
					time.Sleep(took)
					p.took(took, 1)
				}
			}
			run(time.Millisecond, 200)
			if len(told) != 0 {
				t.Fatalf("told %v of a quick etcd", told)
			}
			run(time.Second, 2*paceTxns) // a transaction a second is its pace when it is found slow
			if limit := float64(p.limiter.Limit()); !slices.Equal(told, []bool{true}) || limit > 0.51 {
				t.Errorf("told %v, %v a second", told, limit)
			}
			run(time.Second, 20*paceTxns)
			if limit := float64(p.limiter.Limit()); limit < 0.1 {
				t.Errorf("%v a second: it stands still", limit)
			}
			run(time.Millisecond, 20*paceTxns)
			if !slices.Equal(told, []bool{true, false}) || p.limiter.Limit() != p.most {
				t.Errorf("told %v, %v a second, want %v", told, p.limiter.Limit(), p.most)
			}
		})
	}
}

func TestPassing(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err    error
		passes bool
	}{
		{nil, false},
		{rpctypes.ErrNoSpace, true}, {rpctypes.ErrTooManyRequests, true}, {rpctypes.ErrLeaderChanged, true}, {rpctypes.ErrTimeout, true}, {rpctypes.ErrNoLeader, true},
		{fmt.Errorf("wrapped: %w", rpctypes.ErrTimeoutDueToLeaderFail), true}, {context.DeadlineExceeded, true}, {status.Error(codes.Unavailable, "connection refused"), true},
		{&keyring.Error{Kind: keyring.Unavailable, Text: "no answer"}, true},
		{&keyring.Error{Kind: keyring.KeyUnusable, Text: "disabled"}, false},
		{rpctypes.ErrRequestTooLarge, false}, {rpctypes.ErrTooManyOps, false}, {rpctypes.ErrPermissionDenied, false}, {rpctypes.ErrCorrupt, false},
		{status.Error(codes.ResourceExhausted, "grpc: received message larger than max (2 vs. 1)"), false},
	} {
		if got := temporary(test.err) != ""; got != test.passes {
			t.Errorf("%v passes: %v", test.err, got)
		}
	}
	if !tooLarge(rpctypes.ErrRequestTooLarge) || !tooLarge(status.Error(codes.ResourceExhausted, "trying to send message larger than max (2 vs. 1)")) || tooLarge(rpctypes.ErrNoSpace) {
		t.Error("what is too large")
	}
}

// script is a rule that seals and opens as it is told.
type script struct {
	seal    func(value []byte) ([]byte, error)
	inspect func(stored []byte) ([]byte, keyring.ValueState, error)
}

func (s script) Seal(_ context.Context, _, value []byte) ([]byte, error) { return s.seal(value) }

// Sealed implements [inventory.Sealer].
func (s script) Sealed([]byte) bool { return false }

// Recheck implements [inventory.Sealer]: the KMS is well whenever it is asked.
func (s script) Recheck([]byte) (keyring.State, bool) {
	return keyring.State{Healthy: true, LastGood: time.Now()}, true
}

func (s script) Inspect(_ context.Context, _, stored []byte) ([]byte, keyring.ValueState, error) {
	return s.inspect(stored)
}

// stored makes a stored value with a key ID and a mark, which stands where the ciphertext would.
func stored(t *testing.T, keyID, mark string) []byte {
	t.Helper()
	o := envelope.Object{Header: envelope.Header{Type: envelope.TypeSeed, KeyID: keyID, Source: []byte(mark)}, Data: []byte(mark + strings.Repeat(".", 100))}
	b, err := o.Append([]byte("k8s:enc:kms:v2:main:"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRenew: what is written is opened first; what would be no better, would open to something
// else, or may not be sealed is left.
func TestRenew(t *testing.T) {
	t.Parallel()
	opensTo := func(text string, fresh keyring.ValueState) func([]byte) ([]byte, keyring.ValueState, error) {
		return func(b []byte) ([]byte, keyring.ValueState, error) {
			if strings.Contains(string(b), "fresh") {
				return []byte(text), fresh, nil
			}
			return []byte("value"), keyring.Stale, nil
		}
	}
	seals := func(keyID string) func([]byte) ([]byte, error) {
		return func([]byte) ([]byte, error) { return stored(t, keyID, "fresh"), nil }
	}
	for name, test := range map[string]struct {
		rule script
		what finding
		why  string
	}{
		"renewed":             {script{seals("2"), opensTo("value", keyring.Current)}, isToWrite, ""},
		"a damaged result":    {script{seals("2"), opensTo("other", keyring.Current)}, isSkipped, "does not decrypt to the old plaintext"},
		"no better":           {script{seals("1"), opensTo("value", keyring.Stale)}, isSkipped, "would change nothing"},
		"better, not current": {script{seals("2"), opensTo("value", keyring.Stale)}, isToWrite, ""},
		"refused": {script{
			func([]byte) ([]byte, error) { return nil, &keyring.Error{Kind: keyring.Refused, Text: "looks sealed"} }, opensTo("value", keyring.Current),
		}, isSkipped, "looks sealed"},
		"key disabled": {script{
			func([]byte) ([]byte, error) { return nil, &keyring.Error{Kind: keyring.KeyUnusable, Text: "disabled"} }, opensTo("value", keyring.Current),
		}, isSkipped, "disabled"},
	} {
		t.Run(name, func(t *testing.T) {
			rules := inventory.NewRules([]inventory.Rule{{Prefix: "/", WriteWith: "main", Sealer: test.rule}})
			r := newRun(Config{Rules: func() *inventory.Rules { return rules }})
			kv := &mvccpb.KeyValue{Key: []byte("/a"), Value: stored(t, "1", "old"), ModRevision: 7, Lease: 8}
			f, err := r.renew(t.Context(), kv, true)
			next := f.next
			if err != nil || f.what != test.what {
				t.Fatalf("%v, %v, want %v", f.what, err, test.what)
			}
			if f.what == isToWrite && (next.revision != 7 || next.lease != 8 || string(next.value) == string(kv.Value)) {
				t.Errorf("item %+v", next)
			}
			if left := r.result().Skipped; (test.why != "") != (len(left) == 1) || len(left) == 1 && !strings.Contains(left[0].Why, test.why) {
				t.Errorf("left %v, want %q", left, test.why)
			}
		})
	}
}

// TestRenewWaits: a KMS that does not answer is waited for, and that is told once.
func TestRenewWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		rule := script{nil, func([]byte) ([]byte, keyring.ValueState, error) {
			if calls++; calls < 20 {
				return nil, keyring.Undecryptable, &keyring.Error{Kind: keyring.Unavailable, Text: "no answer"}
			}
			return nil, keyring.Current, nil
		}}
		rules := inventory.NewRules([]inventory.Rule{{Prefix: "/", WriteWith: "main", Sealer: rule}})
		var told []string
		r := newRun(Config{Rules: func() *inventory.Rules { return rules }, Paused: func(_, why string) { told = append(told, why) }})
		if f, err := r.renew(t.Context(), &mvccpb.KeyValue{Key: []byte("/a")}, true); err != nil || f.what != isCurrent {
			t.Errorf("%v, %v", f.what, err)
		}
		if !slices.Equal(told, []string{"no answer", ""}) {
			t.Errorf("told %q", told)
		}
		calls = 0
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.renew(ctx, &mvccpb.KeyValue{Key: []byte("/a")}, true); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the end of the run: %v", err)
		}
	})
}

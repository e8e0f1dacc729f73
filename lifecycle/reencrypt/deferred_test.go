package reencrypt

import (
	"bytes"
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// fixed is an etcd of one key, for reads.
type fixed struct {
	clientv3.KV
	kv *mvccpb.KeyValue
}

func (f fixed) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return &clientv3.GetResponse{Kvs: []*mvccpb.KeyValue{f.kv}}, nil
}

// well is a rule whose KMS is well from some time on.
type well struct {
	script
	since time.Time
}

func (w well) Recheck([]byte) (keyring.State, bool) {
	if time.Now().Before(w.since) {
		return keyring.State{Reason: "out of reach"}, true
	}
	return keyring.State{Healthy: true, LastGood: time.Now()}, true
}

// TestSettle: a seed that is refused is left once its KMS has been well and refused it for a while;
// one that opens again is taken up; and while the KMS is not well, nothing is decided.
func TestSettle(t *testing.T) {
	t.Parallel()
	refusal := &keyring.Error{Kind: keyring.Unavailable, Text: "refused", Err: &kmsclient.Error{Reason: kmsclient.Failing}}
	silence := &keyring.Error{Kind: keyring.Unavailable, Text: "no answer"}
	const never = 24 * time.Hour
	for name, test := range map[string]struct {
		err         *keyring.Error
		wellAfter   time.Duration // the KMS is well then
		opensAfter  time.Duration // and opens the value then
		dry         bool
		left        bool
		least, most time.Duration
	}{
		"refused":                               {err: refusal, opensAfter: never, left: true, least: refusedFor, most: 3 * refusedFor},
		"refused in a dry run":                  {err: refusal, opensAfter: never, dry: true, left: true, most: 5 * time.Second},
		"refused for a moment":                  {err: refusal, opensAfter: 5 * time.Second, most: 2 * refusedFor},
		"an answered outage":                    {err: refusal, wellAfter: time.Hour, opensAfter: time.Hour, least: time.Hour, most: time.Hour + 2*refusedFor},
		"an outage, then refused":               {err: refusal, wellAfter: time.Hour, opensAfter: never, left: true, least: time.Hour + refusedFor, most: time.Hour + 3*refusedFor},
		"silent for this one":                   {err: silence, opensAfter: never, left: true, least: refusedFor, most: 3 * refusedFor},
		"an outage":                             {err: silence, wellAfter: time.Hour, opensAfter: time.Hour, least: time.Hour, most: time.Hour + 2*refusedFor},
		"refused for a moment after the outage": {err: refusal, wellAfter: time.Hour, opensAfter: time.Hour + 10*time.Second, least: time.Hour, most: time.Hour + 3*refusedFor},
		"an outage in a dry run":                {err: silence, wellAfter: time.Hour, opensAfter: time.Hour, dry: true, least: time.Hour, most: time.Hour + 2*refusedFor},
		"silent after the outage":               {err: silence, wellAfter: time.Hour, opensAfter: never, left: true, least: time.Hour + refusedFor, most: time.Hour + 3*refusedFor},
		"refused, in a dry outage":              {err: refusal, wellAfter: time.Hour, opensAfter: time.Hour, dry: true, least: time.Hour, most: time.Hour + 2*refusedFor},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				kv := &mvccpb.KeyValue{Key: []byte("/a"), Value: stored(t, "1", "old"), ModRevision: 7}
				rule := well{since: begun.Add(test.wellAfter), script: script{inspect: func([]byte) ([]byte, keyring.ValueState, error) {
					if time.Since(begun) < test.opensAfter {
						return nil, keyring.Undecryptable, test.err
					}
					return []byte("v"), keyring.Current, nil
				}}}
				rules := inventory.NewRules([]inventory.Rule{{Prefix: "/", WriteWith: "main", Sealer: rule}})
				var reported []string
				r := newRun(Config{
					Client: &clientv3.Client{KV: fixed{kv: kv}}, Rules: func() *inventory.Rules { return rules }, DryRun: test.dry, Paused: func(what, _ string) { reported = append(reported, what) },
				})
				if next, err := r.first(t.Context(), kv); next != nil || err != nil {
					t.Fatal(next, err)
				}
				if err := r.settle(t.Context()); err != nil {
					t.Fatal(err)
				}
				result, took := r.result(), time.Since(begun)
				if (result.Refused == 1) != test.left || (len(result.Skipped) == 1) != test.left || result.Unfinished() != result.Refused {
					t.Errorf("%+v", result)
				}
				if took < test.least || took > test.most {
					t.Errorf("it took %s, want %s to %s", took, test.least, test.most)
				}
				if outage := test.wellAfter > 0; outage != slices.Contains(reported, waitKMS) && test.err == refusal {
					t.Errorf("reported %q", reported)
				}
				if len(r.active) > 0 {
					t.Errorf("it still waits: %v", r.active)
				}
				// Another value of the seed is not asked for again.
				if test.left {
					other := &mvccpb.KeyValue{Key: []byte("/b"), Value: bytes.Clone(kv.Value)}
					before := time.Now()
					if next, err := r.first(t.Context(), other); next != nil || err != nil || r.result().Refused != 2 || time.Since(before) > 0 {
						t.Errorf("another value: %v, %v, %+v", next, err, r.result())
					}
				}
			})
		})
	}
}

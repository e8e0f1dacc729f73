package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// TestKMSCalls counts what a KMS is asked: one data key at the start, one for each rotation, and
// one unwrap for each seed that is read after a restart, however many values there are. A seed is
// unwrapped once before it is used, which the ten that are allowed hold.
func TestKMSCalls(t *testing.T) {
	const rotations, each = 4, 1000
	double, d, ctx := clitest.NewDouble(t, kmsdouble.Config{}), clitest.NewDir(t), context.Background()
	edits := d.OnAlibaba(t, double, clitest.FileCredentials)
	a, rule, stop := rulesOf(t, d, edits...)
	key := func(i int) []byte { return fmt.Appendf(nil, "/registry/secrets/ns/s%d", i) }
	var stored [][]byte
	for round := range rotations + 1 {
		if round > 0 {
			double.Rotate(kmsdouble.DefaultKeyID)
			clitest.Eventually(t, "seed of the new version", func() bool { return a.keys.Rings()[0].State().SealedBy == double.PrimaryKeyID(kmsdouble.DefaultKeyID) })
		}
		for range each {
			v, err := rule.Seal(ctx, key(len(stored)), fmt.Appendf(nil, "value %d", len(stored)))
			if err != nil {
				t.Fatal(err)
			}
			stored = append(stored, v)
		}
	}
	for i, v := range stored {
		if got, err := rule.Open(ctx, nil, key(i), bytes.Clone(v)); err != nil || string(got) != fmt.Sprintf("value %d", i) {
			t.Fatalf("value %d: %q, %v", i, got, err)
		}
	}
	generated := double.Calls("GenerateDataKey")
	if generated != 1+rotations {
		t.Errorf("%d data keys, want %d", generated, 1+rotations)
	}
	// What nobody reads or writes costs two calls at each poll, whatever is in the cache.
	// A poll makes them in this order. It may be between them at the beginning, and be cut off
	// there at the end.
	probes := double.Calls("Decrypt")
	polls := double.Calls("DescribeKey")
	clitest.Eventually(t, "three polls", func() bool { return double.Calls("DescribeKey") >= polls+3 })
	stop()
	if polls, probes = double.Calls("DescribeKey")-polls, double.Calls("Decrypt")-probes; probes > polls+1 || probes < polls-1 {
		t.Errorf("%d polls, %d unwraps of an idle proxy", polls, probes)
	}
	if n := double.Calls("GenerateDataKey"); n != generated {
		t.Errorf("%d data keys of an idle proxy", n-generated)
	}
	a.Close()
	unwrapped := double.Calls("Decrypt")

	// Polls ask whether the key may still be used; that is not counted here.
	edits[1] = strings.Replace(edits[1], "pollInterval: 1s", "pollInterval: 1h", 1)
	edits = append(edits, "admin:", "cache: {revokeWithin: 1h}\nadmin:")
	_, rule, stop = rulesOf(t, d, edits...)
	defer stop()
	var all sync.WaitGroup
	for w := range 16 {
		all.Go(func() {
			for i := w; i < len(stored); i += 16 {
				if got, err := rule.Open(ctx, nil, key(i), bytes.Clone(stored[i])); err != nil || string(got) != fmt.Sprintf("value %d", i) {
					t.Errorf("value %d after a restart: %q, %v", i, got, err)
				}
			}
		})
	}
	all.Wait()
	if n := double.Calls("Decrypt") - unwrapped; n > 10 || n < rotations {
		t.Errorf("%d unwraps to read %d values under %d seeds", n, len(stored), rotations+1)
	}
	if n := double.Calls("GenerateDataKey") - generated; n != 1 {
		t.Errorf("%d data keys at a restart", n)
	}
}

// TestBurstAtTheKMS: 5,000 callers of one cold seed are one call of the real SDK.
func TestBurstAtTheKMS(t *testing.T) {
	double, d, ctx := clitest.NewDouble(t, kmsdouble.Config{}), clitest.NewDir(t), context.Background()
	edits := d.OnAlibaba(t, double, clitest.FileCredentials)
	a, rule, stop := rulesOf(t, d, edits...)
	stored, err := rule.Seal(ctx, []byte("k"), []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	stop()
	a.Close()
	edits[1] = strings.Replace(edits[1], "pollInterval: 1s", "pollInterval: 1h", 1)
	a, rule, stop = rulesOf(t, d, append(edits, "admin:", "cache: {revokeWithin: 1h}\nadmin:")...)
	defer stop()
	clitest.Eventually(t, "first seed", func() bool { return a.keys.Rings()[0].State().CanSeal })
	unwrapped := double.Calls("Decrypt")
	var all sync.WaitGroup
	for range 5000 {
		all.Go(func() {
			if got, err := rule.Open(ctx, nil, []byte("k"), bytes.Clone(stored)); err != nil || string(got) != "v" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	all.Wait()
	if n := double.Calls("Decrypt") - unwrapped; n != 1 {
		t.Errorf("%d unwraps", n)
	}
}

const canaryValue = "a value that no log, metric or error holds:"

// TestEverythingChanges is for the race detector: 64 goroutines seal and open while sessions are
// fetched again, the key is rotated, disabled and enabled, and the rules are reloaded. What opens
// is right; what does not says that the key may not be used, or the KMS not be reached; and in the
// end everything opens.
func TestEverythingChanges(t *testing.T) {
	double, d := clitest.NewDouble(t, kmsdouble.Config{AccessKeys: []kmsdouble.AccessKey{}}), clitest.NewDir(t)
	sts := kmsdouble.NewSTS(t, kmsdouble.STSConfig{Register: double.SetAccessKey, Lifetime: 3 * time.Second})
	edits := d.OnAlibaba(t, double, "{type: assumeRole, accessKeyIDFile: id, accessKeySecretFile: secret, roleARN: '"+kmsdouble.DefaultRoleARN+
		"', stsEndpoint: '"+sts.Endpoint()+"', stsCAFile: "+sts.CAFile()+"}")
	edits = append(edits, "admin:", "cache: {revokeWithin: 1s}\nadmin:")
	a, r := newRunningIn(t, d, edits...)
	stop := runRings(t, a)
	defer stop()
	rule := func() *rule.Sealer { return a.keys.Rules().Sealers()[0] }
	clitest.Eventually(t, "first seed", func() bool { return a.keys.Rings()[0].State().CanSeal })

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	type sealed struct{ key, value, stored []byte }
	var (
		mu           sync.Mutex
		kept         []sealed
		keyIDs       = map[string]bool{} // that values are sealed under
		good, denied atomic.Int64
		workers, all sync.WaitGroup
	)
	clitest.Told.Secret("a value", []byte(canaryValue))
	passing := func(err error) bool {
		e, ok := errors.AsType[*keyring.Error](clitest.Told.Error(err))
		return ok && (e.Kind == keyring.Unavailable || e.Kind == keyring.KeyUnusable)
	}
	for w := range 64 {
		workers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				s := sealed{key: fmt.Appendf(nil, "/registry/secrets/ns/%d-%d", w, i), value: fmt.Appendf(nil, "%s %d-%d", canaryValue, w, i)}
				var err error
				if s.stored, err = rule().Seal(t.Context(), s.key, s.value); err == nil {
					_, object, _ := envelope.Split(s.stored)
					o, err := envelope.Parse(object)
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					keyIDs[o.KeyID] = true
					if len(kept) < 100_000 {
						kept = append(kept, s)
					}
					s = kept[rand.IntN(len(kept))]
					mu.Unlock()
					var got []byte
					if got, err = rule().Open(t.Context(), nil, s.key, bytes.Clone(s.stored)); err == nil && !bytes.Equal(got, s.value) {
						t.Errorf("%s opened as %q", s.key, got)
					}
				}
				switch {
				case err == nil:
					good.Add(1)
				case passing(err):
					denied.Add(1)
				default:
					t.Errorf("%v", err)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	every := func(d time.Duration, f func(i int)) {
		all.Go(func() {
			tick := time.NewTicker(d)
			defer tick.Stop()
			for i := 0; ; i++ {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					f(i)
				}
			}
		})
	}
	every(300*time.Millisecond, func(int) { double.Rotate(kmsdouble.DefaultKeyID) })
	every(1100*time.Millisecond, func(i int) {
		double.SetState(kmsdouble.DefaultKeyID, []kmsdouble.State{kmsdouble.Disabled, kmsdouble.Enabled}[i%2])
	})
	every(200*time.Millisecond, func(i int) {
		more := append([]string{}, edits...)
		if i%2 == 0 {
			more = append(more, "rules:\n", fmt.Sprintf("rules:\n- {prefix: /more%d/, writeWith: dev}\n", i%3))
		}
		r.allowWeakening = true // rules go as well
		d.Config(t, more...)
		r.reload("test")
	})
	applied := func() float64 { return metricValue(t, a, `etcd_kms_proxy_config_reloads_total{outcome="applied"}`) }
	begun := time.Now()
	clitest.Eventually(t, "everything to change, for 5 s at least", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return time.Since(begun) > 5*time.Second && good.Load() > 0 && denied.Load() > 0 && len(keyIDs) >= 3 && sts.Calls("AssumeRole") >= 2 && applied() >= 2
	})
	cancel()
	workers.Wait()
	all.Wait()
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
	clitest.Eventually(t, "the key to be usable", func() bool { return a.keys.Rings()[0].State().CanSeal })
	for _, s := range kept {
		var got []byte
		clitest.Eventually(t, "every value to open", func() bool {
			var err error
			got, err = rule().Open(t.Context(), nil, s.key, bytes.Clone(s.stored))
			return err == nil
		})
		if !bytes.Equal(got, s.value) {
			t.Fatalf("%s opened as %q", s.key, got)
		}
	}
	if n := metricValue(t, a, `etcd_kms_proxy_config_reloads_total{outcome="failed"}`); n > 0 {
		t.Errorf("%v reloads failed", n)
	}
	if strings.Contains(metricsOf(t, a), kmsdouble.DefaultAccessKeySecret) {
		t.Error("a metric holds a secret")
	}
}

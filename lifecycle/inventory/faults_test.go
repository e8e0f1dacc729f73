package inventory

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

func testRules(sealer Sealer) *Rules {
	return NewRules([]Rule{
		{Prefix: "/r/", WriteWith: "main", Sealer: sealer}, {Prefix: "/r/plain/", WriteWith: Plaintext, Sealer: sealer}, {Prefix: "/t/", WriteWith: "main", Sealer: sealer},
	}, "/r/exempt/")
}

// TestScanWithOthers: a scan visits each key once at one revision; a compaction between any two
// pages has it continue at the present, which it says, and a restore ends it.
func TestScanWithOthers(t *testing.T) {
	t.Parallel()
	for _, change := range []string{"nothing", "writes", "compacts", "restores"} {
		for call := range 8 {
			synctest.Test(t, func(t *testing.T) {
				c := etcdtest.New(t, 1)
				c.PageBytes = 4000
				want := make(map[string]string)
				for i := range 200 {
					key := fmt.Sprintf("/r/%03d", i)
					want[key] = strings.Repeat("v", i)
					c.Put(key, want[key])
				}
				backup, n := c.Store().Clone(), 0
				c.Put("/x", "x")
				begun := c.Store().Rev()
				c.Intercept = func(*etcdtest.Call) etcdtest.Fault {
					if n++; n-1 == call {
						switch change {
						case "writes", "compacts":
							c.Put("/r/199", "new")
							c.Delete("/r/198")
							if change == "compacts" {
								c.Compact(0)
							}
						case "restores":
							c.Restore(backup)
						}
					}
					return etcdtest.Fault{}
				}
				got := make(map[string]string)
				span, err := Scan(t.Context(), c.Client(t, "scan"), []string{"/r/"}, 0, func(kv *mvccpb.KeyValue) error {
					if _, twice := got[string(kv.Key)]; twice {
						t.Errorf("%s was visited twice", kv.Key)
					}
					got[string(kv.Key)] = string(kv.Value)
					return nil
				})
				switch change {
				case "restores":
					if call == 0 { // before the scan has read anything
						begun = c.Store().Rev()
					} else {
						if !errors.Is(err, restore.ErrRestored) {
							t.Errorf("a restore at call %d: %v", call, err)
						}
						return
					}
				case "writes", "compacts":
					if call == 0 || change == "compacts" {
						want["/r/199"] = "new"
						delete(want, "/r/198")
					}
					if call == 0 {
						begun += 2
					}
				}
				last := begun
				if change == "compacts" {
					last = c.Store().Rev()
				}
				if err != nil || !maps.Equal(got, want) || span != (Span{First: begun, Last: last}) {
					t.Errorf("%s at call %d: %d keys, %+v, %v; want %d from %d to %d", change, call, len(got), span, err, len(want), begun, last)
				}
				if n < 8 {
					t.Errorf("it took %d calls only", n)
				}
			})
		}
	}
}

// TestSurvey: each value counts once, under its rule, in its state.
func TestSurvey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, current, old := etcdtest.New(t, 1), etcdtest.Sealer{KeyID: "2"}, etcdtest.Sealer{KeyID: "1"}
		put := func(key string, s Sealer, value string) {
			stored := []byte(value)
			if s != nil {
				stored, _ = s.Seal(t.Context(), []byte(key), stored)
			}
			c.Put(key, string(stored))
		}
		for i := range 90 {
			put(fmt.Sprintf("/r/%02d", i), []Sealer{current, old, nil}[i%3], "value")
		}
		foreign, _ := current.Seal(t.Context(), []byte("/another"), nil)
		c.Put("/r/damaged", string(foreign))
		put("/r/exempt/x", nil, "value")
		put("/t/x", current, "value")
		put("/u/x", nil, "value")
		c.Delete("/r/00")
		rules := testRules(current)
		counts, span, err := Survey(t.Context(), c.Client(t, "survey"), rules, nil)
		if err != nil || span.First != c.Store().Rev() || len(counts) != 3 {
			t.Fatalf("%+v, %+v, %v", counts, span, err)
		}
		states := counts[0].States
		if counts[0].All.Keys != 90 || states[keyring.Current].Keys != 29 || states[keyring.Stale].Keys != 30 || states[keyring.Unencrypted].Keys != 30 || states[keyring.Undecryptable].Keys != 1 {
			t.Errorf("%+v", counts[0])
		}
		if counts[1].All.Keys != 0 || counts[2].All.Keys != 1 || !counts[2].Done() || counts[0].Done() {
			t.Errorf("%+v", counts)
		}
		current.Down = func() *keyring.Error { return &keyring.Error{Kind: keyring.Unavailable, Text: "no answer"} }
		if counts, _, err = Survey(t.Context(), c.Client(t, "survey"), testRules(current), nil); err != nil || counts[0].States[Unavailable].Keys != 60 {
			t.Errorf("without a KMS: %+v, %v", counts, err)
		}
	})
}

// TestBypassWithFaults: every plaintext value under a rule that encrypts is found, if it is still
// there when the watch comes back: streams end, etcd is away, compacts, or is restored between any
// two writes.
func TestBypassWithFaults(t *testing.T) {
	for name, fault := range map[string]func(c *etcdtest.Cluster, away *bool){
		"nothing":         func(*etcdtest.Cluster, *bool) {},
		"the stream ends": func(c *etcdtest.Cluster, _ *bool) { c.Cut() },
		"compacts":        func(c *etcdtest.Cluster, _ *bool) { c.Compact(0) },
		"ends and compacts": func(c *etcdtest.Cluster, _ *bool) {
			c.Cut()
			c.Put("/r/z", "late")
			c.Put("/u/x", "later")
			c.Compact(0)
		},
		"is away": func(c *etcdtest.Cluster, away *bool) {
			*away = true
			c.Cut()
		},
		"is restored": func(c *etcdtest.Cluster, _ *bool) {
			old := etcdtest.New(nopCleanup{}, 0)
			old.Put("/r/from-the-backup", "plaintext")
			old.Put("/t/from-the-backup", "plaintext")
			c.Restore(old.Store())
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for at := range 8 {
				synctest.Test(t, func(t *testing.T) {
					c := etcdtest.New(t, 1)
					var mu sync.Mutex
					away, found := false, make(map[string]bool)
					c.Intercept = func(*etcdtest.Call) etcdtest.Fault {
						mu.Lock()
						defer mu.Unlock()
						if away {
							return etcdtest.Fault{Err: status.Error(codes.Unavailable, "away")}
						}
						return etcdtest.Fault{}
					}
					sealer := etcdtest.Sealer{KeyID: "1"}
					rules := testRules(sealer)
					b := NewBypassWatcher(BypassConfig{
						Client: c.Client(t, "watch"), Rules: func() *Rules { return rules }, Logger: slog.New(slog.DiscardHandler),
						Found: func(_ *Rule, key string, _ int64) { mu.Lock(); found[key] = true; mu.Unlock() },
					})
					c.Put("/r/before", "plaintext") // it is for status to find
					ctx, stop := context.WithCancel(t.Context())
					ended := make(chan struct{})
					go func() { defer close(ended); b.Run(ctx) }()
					time.Sleep(time.Second)
					var want []string
					for i := range 8 {
						if i == at {
							mu.Lock()
							fault(c, &away)
							mu.Unlock()
						}
						sealed, _ := sealer.Seal(t.Context(), []byte("/r/sealed"), nil)
						c.Put("/r/sealed", string(sealed))
						c.Put("/r/plain/x", "plaintext")
						c.Put("/r/exempt/x", "plaintext")
						c.Put("/u/x", "plaintext")
						for _, prefix := range []string{"/r/", "/t/"} {
							want = append(want, fmt.Sprint(prefix, i))
							c.Put(want[len(want)-1], "plaintext")
						}
						time.Sleep(50 * time.Millisecond)
					}
					time.Sleep(time.Minute)
					mu.Lock()
					away = false
					mu.Unlock()
					time.Sleep(time.Minute)
					stop()
					<-ended
					if name == "ends and compacts" {
						want = append(want, "/r/z")
					}
					if name == "is restored" {
						want = append(want, "/r/from-the-backup", "/t/from-the-backup")
						// some are gone with the old data
						want = slices.DeleteFunc(want, func(k string) bool { return found[k] })
						if found["/r/before"] {
							t.Errorf("found %v", found)
						}
					}
					for _, k := range want {
						if !found[k] {
							t.Errorf("at %d: %s was not found", at, k)
						}
						delete(found, k)
					}
					if name != "is restored" && len(found) > 0 {
						t.Errorf("at %d: found %v besides", at, found)
					}
				})
			}
		})
	}
}

// TestBypassRules: what a changed set of rules covers is watched from the revision at which it
// changed.
func TestBypassRules(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, sealer := etcdtest.New(t, 1), etcdtest.Sealer{KeyID: "1"}
		var mu sync.Mutex
		var found []string
		rules := NewRules([]Rule{{Prefix: "/r/", WriteWith: "main", Sealer: sealer}})
		b := NewBypassWatcher(BypassConfig{
			Client: c.Client(t, "watch"), Rules: func() *Rules { mu.Lock(); defer mu.Unlock(); return rules }, Logger: slog.New(slog.DiscardHandler),
			Found: func(_ *Rule, key string, _ int64) { mu.Lock(); found = append(found, key); mu.Unlock() },
		})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); b.Run(ctx) }()
		time.Sleep(time.Second)
		c.Put("/t/before", "plaintext")
		mu.Lock()
		rules = testRules(sealer).Since(c.Store().Rev())
		mu.Unlock()
		c.Put("/t/between", "plaintext")
		c.Put("/r/between", "plaintext")
		b.RulesChanged()
		time.Sleep(time.Second)
		c.Put("/t/after", "plaintext")
		time.Sleep(time.Second)
		stop()
		<-ended
		slices.Sort(found)
		if found = slices.Compact(found); !slices.Equal(found, []string{"/r/between", "/t/after", "/t/between"}) {
			t.Errorf("found %q", found)
		}
	})
}

// nopCleanup is for a cluster that only holds data.
type nopCleanup struct{ testing.TB }

func (nopCleanup) Cleanup(func()) {}

package keyring

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestBurstOnAColdSeedUnwrapsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		kms.set(func() { kms.delay = 50 * time.Millisecond })
		var wg sync.WaitGroup
		for i := range 5000 {
			wg.Go(func() {
				if i%2 == 0 { // half of them while the call is under way
					time.Sleep(time.Duration(i) * 20 * time.Microsecond)
				}
				g.mustOpen(t, "k", stored, "v")
			})
		}
		wg.Wait()
		if n := kms.count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
		if n := g.events.get("ack miss") + g.events.get("ack hit"); n != 5000 {
			t.Errorf("%d hits and misses", n)
		}
	})
}

func TestEachWaiterHonoursItsOwnContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		kms.set(func() { kms.delay = 10 * time.Second })
		began := time.Now()
		gone := errors.New("client went away")
		first, cancel := context.WithCancelCause(context.Background())
		done := make(chan error)
		go func() {
			_, err := g.sealer.Open(first, []byte("k"), bytes.Clone(stored))
			done <- err
		}()
		second := make(chan error)
		go func() {
			_, err := g.open("k", stored)
			second <- err
		}()
		time.Sleep(time.Second)
		cancel(gone)
		err := <-done
		wantKind(t, err, Unavailable)
		if !errors.Is(err, gone) || time.Since(began) != time.Second {
			t.Errorf("the first waiter: %v after %v", err, time.Since(began))
		}
		if err := <-second; err != nil { // the call is not the first one's to end
			t.Errorf("the second waiter: %v", err)
		}
		if n := kms.count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
	})
}

// TestMessageBufferIsReused: the unwrap outlives its caller, whose message is then overwritten.
func TestMessageBufferIsReused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		kms.set(func() { kms.delay = time.Second })
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		message := bytes.Clone(stored)
		_, err := g.sealer.Open(ctx, []byte("k"), message)
		wantKind(t, err, Unavailable)
		clear(message)
		time.Sleep(2 * time.Second)
		g.mustOpen(t, "k", stored, "v")
		message = bytes.Clone(stored)
		if got, err := g.sealer.Open(context.Background(), []byte("k"), message); err != nil || string(got) != "v" {
			t.Fatalf("open = %q, %v", got, err)
		}
		clear(message)
		g.mustOpen(t, "k", stored, "v")
		if n := kms.count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
	})
}

func TestTTLAndServeUnreachableFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		g := newRing(t, kms, func(_ *RingConfig, c *CacheConfig) { c.TTL, c.ServeUnreachableFor = time.Hour, 2*time.Hour }).start(t)
		g.mustOpen(t, "k", stored, "v")
		time.Sleep(59 * time.Minute)
		g.mustOpen(t, "k", stored, "v")
		if n := kms.count("Decrypt"); n != 1 {
			t.Fatalf("%d Decrypt calls within the TTL", n)
		}
		time.Sleep(2 * time.Minute)
		g.mustOpen(t, "k", stored, "v")
		if n := kms.count("Decrypt"); n != 2 {
			t.Fatalf("%d Decrypt calls after the TTL", n)
		}
		time.Sleep(59 * time.Minute)
		kms.set(func() {
			kms.down = kmsError("Decrypt", kmsclient.Unreachable)
			kms.delay = 5 * time.Second // a KMS that hangs
		})
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		began := time.Now()
		for range 100 {
			g.mustOpen(t, "k", stored, "v")
		}
		if d := time.Since(began); d > 0 {
			t.Errorf("a silent KMS held up readers for %v", d)
		}
		if g.events.get("ack stale") != 100 {
			t.Errorf("%d stale", g.events.get("ack stale"))
		}
		time.Sleep(118 * time.Minute)
		g.mustOpen(t, "k", stored, "v")
		time.Sleep(2 * time.Minute)
		_, err := g.open("k", stored)
		wantKind(t, err, Unavailable)
		kms.set(func() { kms.down = nil })
		time.Sleep(20 * time.Second)
		g.mustOpen(t, "k", stored, "v")
	})
}

// TestAgeingSeedIsRenewed: while stale seeds serve, the KMS is tried in the background, and its
// answer renews them.
func TestAgeingSeedIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		g := newRing(t, kms, func(_ *RingConfig, c *CacheConfig) { c.TTL = time.Hour }).start(t)
		g.mustOpen(t, "k", stored, "v")
		kms.set(func() { kms.opErr["Decrypt"] = kmsError("Decrypt", kmsclient.Unreachable) })
		time.Sleep(time.Hour + time.Second)
		for range 600 { // ten minutes, the contacts being good
			g.mustOpen(t, "k", stored, "v")
			time.Sleep(time.Second)
		}
		if n := kms.count("Decrypt"); n > 65 {
			t.Errorf("%d Decrypt calls in ten minutes of an outage", n)
		}
		kms.set(func() { kms.opErr = map[string]error{}; kms.calls = map[string]int{} })
		time.Sleep(10 * time.Second)
		for range 100 {
			g.mustOpen(t, "k", stored, "v")
		}
		if n := kms.count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls to renew a seed", n)
		}
	})
}

func TestDecryptFailures(t *testing.T) {
	for reason, want := range map[kmsclient.Reason]Kind{
		kmsclient.Unreachable: Unavailable, kmsclient.BrokenContract: SeedRefused, kmsclient.Denied: KeyUnusable,
		kmsclient.KeyDisabled: KeyUnusable, kmsclient.Invalid: Corrupt,
	} {
		for _, form := range []string{"not applied", "applied and lost"} {
			t.Run(fmt.Sprintf("%v %s", reason, form), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					kms := newKMS(t, "ack")
					stored := kms.sealed(t, "k", "v")
					g := newRing(t, kms, nil).start(t)
					synctest.Wait()
					fault := kmsError("Decrypt", reason)
					if form == "not applied" {
						kms.set(func() { kms.opErr["Decrypt"] = fault })
					} else {
						kms.set(func() { kms.lost = fault })
					}
					_, err := g.open("k", stored)
					wantKind(t, err, want)
					for _, part := range []string{`"/s/"`, `"ack"`, `"key-1"`, `"req-7"`} {
						if !strings.Contains(err.Error(), part) {
							t.Errorf("the text does not hold %s: %v", part, err)
						}
					}
					if want == Corrupt && !strings.Contains(err.Error(), `etcd key "k"`) {
						t.Errorf("the text does not name the etcd key: %v", err)
					}
					// Nothing negative is kept.
					kms.set(func() { kms.opErr, kms.lost = map[string]error{}, nil })
					time.Sleep(10 * time.Second)
					g.mustOpen(t, "k", stored, "v")
				})
			})
		}
	}
}

// TestUnknownErrorsSayNothing: the text of an error that is not a kmsclient.Error could hold a
// request.
func TestUnknownErrorsSayNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		kms.down = errors.New("post https://kms/?Plaintext=canary")
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		_, serr := g.seal("k", "v")
		wantKind(t, serr, Unavailable)
		_, oerr := g.open("k", stored)
		wantKind(t, oerr, Unavailable)
		if s := fmt.Sprint(serr, oerr, g.State(), g.sealer.Health()); strings.Contains(s, "canary") {
			t.Error(s)
		}
	})
}

func TestDecryptAnswersTheWrongLength(t *testing.T) {
	for name, c := range map[string]struct {
		result func([]byte) []byte
		want   Kind
	}{
		"empty": {func([]byte) []byte { return nil }, SeedRefused},
		"short": {func(b []byte) []byte { return b[:31] }, SeedRefused},
		"other": {func(b []byte) []byte { return bytes.Repeat([]byte{1}, 32) }, Corrupt},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := newKMS(t, "ack")
				stored := kms.sealed(t, "k", "v")
				g := newRing(t, kms, nil).start(t)
				synctest.Wait()
				kms.set(func() { kms.result = c.result })
				_, err := g.open("k", stored)
				wantKind(t, err, c.want)
				// A wrong answer is not kept for long: reads ask again, less and less often.
				kms.set(func() { kms.calls = map[string]int{} })
				for range 100 {
					_, err := g.open("k", stored)
					wantKind(t, err, c.want)
				}
				if n := kms.count("Decrypt"); n != 0 {
					t.Errorf("%d Decrypt calls for 100 reads at once", n)
				}
				kms.set(func() { kms.result = nil })
				time.Sleep(5 * time.Second)
				g.mustOpen(t, "k", stored, "v")
			})
		})
	}
}

// TestGarbageIsNotHandedOn: a KMS that answers something else than it wrapped does not make a value
// damaged, which a rule would hand on as stored.
func TestGarbageIsNotHandedOn(t *testing.T) {
	wrong := func(n int) func([]byte) []byte {
		return func(b []byte) []byte {
			if n--; n < 0 {
				return b
			}
			return bytes.Repeat([]byte{byte(n)}, len(b))
		}
	}
	for name, c := range map[string]struct {
		result  func([]byte) []byte
		tamper  bool
		want    string // "" is an error
		decrypt int
	}{
		"short": {func(b []byte) []byte { return b[:31] }, false, "", 1},
		// a seed may be longer, and this one always is
		"long":             {func(b []byte) []byte { return append(b, 1) }, false, "stored", 2},
		"wrong once":       {wrong(1), false, "v", 2},
		"never the same":   {wrong(100), false, "", 2},
		"wrong and damage": {wrong(1), true, "", 2},
		"damage":           {nil, true, "stored", 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := newKMS(t, "ack")
				stored := kms.sealed(t, "k", "v")
				if c.tamper {
					stored[len("k8s:enc:kms:v2:ack:")+40] ^= 1 // within info or ciphertext
				}
				g := newRing(t, kms, nil).start(t)
				rule, err := NewSealer(SealerConfig{Prefix: "/s/", Write: g.Ring, AllowPlaintextReads: true, Passthrough: true})
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				kms.set(func() { kms.result, kms.calls = c.result, map[string]int{} })
				got, err := rule.Open(t.Context(), []byte("k"), bytes.Clone(stored))
				switch {
				case c.want == "":
					wantKind(t, err, SeedRefused)
				case err != nil:
					t.Fatal(err)
				case c.want == "stored" && !bytes.Equal(got, stored), c.want != "stored" && string(got) != c.want:
					t.Errorf("opened as %q", got)
				}
				if n := kms.count("Decrypt"); n != c.decrypt {
					t.Errorf("%d Decrypt calls, want %d", n, c.decrypt)
				}
			})
		})
	}
}

// TestProvenSeedSurvivesATamperedValue: a seed that has opened a value is not unwrapped again for
// one that does not open.
func TestProvenSeedSurvivesATamperedValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		g := newRing(t, kms, nil).start(t)
		g.mustOpen(t, "k", stored, "v")
		for range 10 {
			_, err := g.open("other", stored)
			wantKind(t, err, Corrupt)
		}
		if n := kms.count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
	})
}

func TestTypeZeroIsRead(t *testing.T) {
	for _, n := range []int{15, 16, 24, 32, 33} {
		synctest.Test(t, func(t *testing.T) {
			kms := newKMS(t, "ack")
			secret := bytes.Repeat([]byte{7}, n)
			h := kms.header(secret, envelope.TypeKey)
			o := envelope.Object{Header: h, Data: typeZero(t, append(secret, make([]byte, 32)...)[:max(16, n/8*8)], "k", "v")}
			stored, err := o.Append([]byte("k8s:enc:kms:v2:ack:"))
			if err != nil {
				t.Fatal(err)
			}
			g := newRing(t, kms, nil).start(t)
			synctest.Wait()
			if n == 15 || n == 33 {
				_, err := g.open("k", stored)
				wantKind(t, err, SeedRefused)
				return
			}
			g.mustOpen(t, "k", stored, "v")
			if _, s, err := g.sealer.Inspect(context.Background(), []byte("k"), stored); s != Stale || err != nil {
				t.Errorf("Inspect = %v, %v", s, err)
			}
		})
	}
}

func TestCacheIsBoundedAndShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newKMS(t, "a"), newKMS(t, "b")
		ga := newRing(t, a, func(_ *RingConfig, c *CacheConfig) { c.Seeds = 100 }).start(t)
		gb := newRing(t, b, func(c *RingConfig, _ *CacheConfig) { c.Cache = ga.cache }).start(t)
		for i := range 300 {
			g, kms := ga, a
			if i%2 == 0 {
				g, kms = gb, b
			}
			key := fmt.Sprint(i)
			g.mustOpen(t, key, kms.sealed(t, key, "v"), "v")
			if n := ga.cache.Len(); n > 100 {
				t.Fatalf("%d seeds in a cache for 100", n)
			}
		}
		// A seed in use stays, though its reads do not go through the cache's lock.
		hot := a.sealed(t, "hot", "v")
		ga.mustOpen(t, "hot", hot, "v")
		a.set(func() { a.calls = map[string]int{} })
		for i := range 300 {
			key := fmt.Sprint("x", i)
			ga.mustOpen(t, key, a.sealed(t, key, "v"), "v")
			ga.mustOpen(t, "hot", hot, "v")
			time.Sleep(time.Second)
		}
		if n := a.count("Decrypt"); n != 300 {
			t.Errorf("%d Decrypt calls for 300 cold seeds and a hot one", n)
		}
	})
}

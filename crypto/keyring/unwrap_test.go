package keyring_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"k8s.io/kms/pkg/service"
)

// slowDecrypt holds every Decrypt of a value back until release is closed, whatever its context
// says.
type slowDecrypt struct {
	*ringtest.KMS
	release chan struct{}
}

func (s *slowDecrypt) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	if ctx.Value(ringtest.OfHealthCheck{}) == nil {
		<-s.release
	}
	return s.KMS.Decrypt(ctx, uid, req)
}

// typeZero seals under a key itself: nonce, ciphertext, tag.
func typeZero(t *testing.T, key []byte, etcdKey, value string) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{3}, 12)
	return gcm.Seal(nonce, nonce, []byte(value), []byte(etcdKey))
}

func TestBurstOnAColdSeedUnwrapsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		kms.Set(func() { kms.Delay = 50 * time.Millisecond })
		var wg sync.WaitGroup
		for i := range 5000 {
			wg.Go(func() {
				if i%2 == 0 { // half of them while the call is under way
					time.Sleep(time.Duration(i) * 20 * time.Microsecond)
				}
				g.MustRead(t, "k", stored, "v")
			})
		}
		wg.Wait()
		if n := kms.Count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
		if n := g.Events.Get("ack miss") + g.Events.Get("ack hit"); n != 5000 {
			t.Errorf("%d hits and misses", n)
		}
	})
}

func TestEachWaiterHonoursItsOwnContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		kms.Set(func() { kms.Delay = 10 * time.Second })
		began := time.Now()
		gone := errors.New("client went away")
		first, cancel := context.WithCancelCause(context.Background())
		done := make(chan error)
		go func() {
			_, err := g.Sealer.Open(first, nil, []byte("k"), bytes.Clone(stored))
			done <- err
		}()
		second := make(chan error)
		go func() {
			_, err := g.Read("k", stored)
			second <- err
		}()
		time.Sleep(time.Second)
		cancel(gone)
		err := <-done
		ringtest.WantKind(t, err, keyring.Unavailable)
		if !errors.Is(err, gone) || time.Since(began) != time.Second {
			t.Errorf("the first waiter: %v after %v", err, time.Since(began))
		}
		if err := <-second; err != nil { // the call is not the first one's to end
			t.Errorf("the second waiter: %v", err)
		}
		if n := kms.Count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
	})
}

// TestMessageBufferIsReused: the unwrap outlives its caller, whose message is then overwritten.
func TestMessageBufferIsReused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		kms.Set(func() { kms.Delay = time.Second })
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		message := bytes.Clone(stored)
		_, err := g.Sealer.Open(ctx, nil, []byte("k"), message)
		ringtest.WantKind(t, err, keyring.Unavailable)
		clear(message)
		time.Sleep(2 * time.Second)
		g.MustRead(t, "k", stored, "v")
		message = bytes.Clone(stored)
		if got, err := g.Sealer.Open(context.Background(), nil, []byte("k"), message); err != nil || string(got) != "v" {
			t.Fatalf("open = %q, %v", got, err)
		}
		clear(message)
		g.MustRead(t, "k", stored, "v")
		if n := kms.Count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
	})
}

func TestTTLAndServeUnreachableFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, func(_ *keyring.RingConfig, c *keyring.CacheConfig) {
			c.TTL, c.ServeUnreachableFor = time.Hour, 2*time.Hour
		}).Start(t)
		g.MustRead(t, "k", stored, "v")
		time.Sleep(59 * time.Minute)
		g.MustRead(t, "k", stored, "v")
		if n := kms.Count("Decrypt"); n != 1 {
			t.Fatalf("%d Decrypt calls within the TTL", n)
		}
		time.Sleep(2 * time.Minute)
		g.MustRead(t, "k", stored, "v")
		if n := kms.Count("Decrypt"); n != 2 {
			t.Fatalf("%d Decrypt calls after the TTL", n)
		}
		time.Sleep(59 * time.Minute)
		kms.Set(func() {
			kms.Down = ringtest.KMSError("Decrypt", kmsclient.Unreachable)
			kms.Delay = 5 * time.Second // a KMS that hangs
		})
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		began := time.Now()
		for range 100 {
			g.MustRead(t, "k", stored, "v")
		}
		if d := time.Since(began); d > 0 {
			t.Errorf("a silent KMS held up readers for %v", d)
		}
		if g.Events.Get("ack stale") != 100 {
			t.Errorf("%d stale", g.Events.Get("ack stale"))
		}
		time.Sleep(118 * time.Minute)
		g.MustRead(t, "k", stored, "v")
		time.Sleep(2 * time.Minute)
		_, err := g.Read("k", stored)
		ringtest.WantKind(t, err, keyring.Unavailable)
		kms.Set(func() { kms.Down = nil })
		time.Sleep(20 * time.Second)
		g.MustRead(t, "k", stored, "v")
	})
}

// TestAgeingSeedIsRenewed: while stale seeds serve, the KMS is tried in the background, and its
// answer renews them.
func TestAgeingSeedIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, func(_ *keyring.RingConfig, c *keyring.CacheConfig) { c.TTL = time.Hour }).Start(t)
		g.MustRead(t, "k", stored, "v")
		kms.Set(func() { kms.OpErr["Decrypt"] = ringtest.KMSError("Decrypt", kmsclient.Unreachable) })
		time.Sleep(time.Hour + time.Second)
		for range 600 { // ten minutes, the contacts being good
			g.MustRead(t, "k", stored, "v")
			time.Sleep(time.Second)
		}
		if n := kms.Count("Decrypt"); n > 65 {
			t.Errorf("%d Decrypt calls in ten minutes of an outage", n)
		}
		kms.Set(func() { kms.OpErr = map[string]error{}; kms.Calls = map[string]int{} })
		time.Sleep(10 * time.Second)
		for range 100 {
			g.MustRead(t, "k", stored, "v")
		}
		if n := kms.Count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls to renew a seed", n)
		}
	})
}

func TestDecryptFailures(t *testing.T) {
	for reason, want := range map[kmsclient.Reason]keyring.Kind{
		kmsclient.Unreachable: keyring.Unavailable, kmsclient.BrokenContract: keyring.SeedRefused, kmsclient.Denied: keyring.KeyUnusable,
		kmsclient.KeyDisabled: keyring.KeyUnusable, kmsclient.Invalid: keyring.Corrupt,
	} {
		for _, form := range []string{"not applied", "applied and lost"} {
			t.Run(fmt.Sprintf("%v %s", reason, form), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					kms := ringtest.NewKMS(t, "ack")
					stored := kms.Encrypted(t, "k", "v")
					g := ringtest.NewRig(t, kms, nil).Start(t)
					synctest.Wait()
					fault := ringtest.KMSError("Decrypt", reason)
					if form == "not applied" {
						kms.Set(func() { kms.OpErr["Decrypt"] = fault })
					} else {
						kms.Set(func() { kms.Lost = fault })
					}
					_, err := g.Read("k", stored)
					ringtest.WantKind(t, err, want)
					for _, part := range []string{`"/s/"`, `"ack"`, `"key-1"`, `"req-7"`} {
						if !strings.Contains(err.Error(), part) {
							t.Errorf("the text does not hold %s: %v", part, err)
						}
					}
					if want == keyring.Corrupt && !strings.Contains(err.Error(), `etcd key "k"`) {
						t.Errorf("the text does not name the etcd key: %v", err)
					}
					// Nothing negative is kept.
					kms.Set(func() { kms.OpErr, kms.Lost = map[string]error{}, nil })
					time.Sleep(10 * time.Second)
					g.MustRead(t, "k", stored, "v")
				})
			})
		}
	}
}

// TestUnknownErrorsSayNothing: the text of an error that is not a kmsclient.Error could hold a
// request.
func TestUnknownErrorsSayNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		kms.Down = errors.New("post https://kms/?Plaintext=canary")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		_, serr := g.Write("k", "v")
		ringtest.WantKind(t, serr, keyring.Unavailable)
		_, oerr := g.Read("k", stored)
		ringtest.WantKind(t, oerr, keyring.Unavailable)
		if s := fmt.Sprint(serr, oerr, g.State(), g.Sealer.Health()); strings.Contains(s, "canary") {
			t.Error(s)
		}
	})
}

func TestDecryptAnswersTheWrongLength(t *testing.T) {
	for name, c := range map[string]struct {
		result func([]byte) []byte
		want   keyring.Kind
	}{
		"empty": {func([]byte) []byte { return nil }, keyring.SeedRefused},
		"short": {func(b []byte) []byte { return b[:31] }, keyring.SeedRefused},
		"other": {func(b []byte) []byte { return bytes.Repeat([]byte{1}, 32) }, keyring.Corrupt},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := ringtest.NewKMS(t, "ack")
				stored := kms.Encrypted(t, "k", "v")
				g := ringtest.NewRig(t, kms, nil).Start(t)
				synctest.Wait()
				kms.Set(func() { kms.Result = c.result })
				_, err := g.Read("k", stored)
				ringtest.WantKind(t, err, c.want)
				// A wrong answer is not kept for long: reads ask again, less and less often.
				kms.Set(func() { kms.Calls = map[string]int{} })
				for range 100 {
					_, err := g.Read("k", stored)
					ringtest.WantKind(t, err, c.want)
				}
				if n := kms.Count("Decrypt"); n != 0 {
					t.Errorf("%d Decrypt calls for 100 reads at once", n)
				}
				kms.Set(func() { kms.Result = nil })
				time.Sleep(5 * time.Second)
				g.MustRead(t, "k", stored, "v")
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
				kms := ringtest.NewKMS(t, "ack")
				stored := kms.Encrypted(t, "k", "v")
				if c.tamper {
					stored[len("k8s:enc:kms:v2:ack:")+40] ^= 1 // within info or ciphertext
				}
				g := ringtest.NewRig(t, kms, nil).Start(t)
				rule, err := rule.New(rule.Config{Prefix: "/s/", Write: g.Ring, AllowPlaintextReads: true, Passthrough: true})
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				kms.Set(func() { kms.Result, kms.Calls = c.result, map[string]int{} })
				got, err := rule.Open(t.Context(), nil, []byte("k"), bytes.Clone(stored))
				switch {
				case c.want == "":
					ringtest.WantKind(t, err, keyring.SeedRefused)
				case err != nil:
					t.Fatal(err)
				case c.want == "stored" && !bytes.Equal(got, stored), c.want != "stored" && string(got) != c.want:
					t.Errorf("opened as %q", got)
				}
				if n := kms.Count("Decrypt"); n != c.decrypt {
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
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		g.MustRead(t, "k", stored, "v")
		for range 10 {
			_, err := g.Read("other", stored)
			ringtest.WantKind(t, err, keyring.Corrupt)
		}
		if n := kms.Count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
	})
}

func TestTypeZeroIsRead(t *testing.T) {
	for _, n := range []int{15, 16, 24, 32, 33} {
		synctest.Test(t, func(t *testing.T) {
			kms := ringtest.NewKMS(t, "ack")
			secret := bytes.Repeat([]byte{7}, n)
			h := kms.Header(secret, envelope.TypeKey)
			o := envelope.Object{Header: h, Data: typeZero(t, append(secret, make([]byte, 32)...)[:max(16, n/8*8)], "k", "v")}
			stored, err := o.Append([]byte("k8s:enc:kms:v2:ack:"))
			if err != nil {
				t.Fatal(err)
			}
			g := ringtest.NewRig(t, kms, nil).Start(t)
			synctest.Wait()
			if n == 15 || n == 33 {
				_, err := g.Read("k", stored)
				ringtest.WantKind(t, err, keyring.SeedRefused)
				return
			}
			g.MustRead(t, "k", stored, "v")
			if _, s, err := g.Sealer.Inspect(context.Background(), []byte("k"), stored); s != keyring.Stale || err != nil {
				t.Errorf("Inspect = %v, %v", s, err)
			}
		})
	}
}

func TestCacheIsBoundedAndShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := ringtest.NewKMS(t, "a"), ringtest.NewKMS(t, "b")
		ga := ringtest.NewRig(t, a, func(_ *keyring.RingConfig, c *keyring.CacheConfig) { c.Seeds = 100 }).Start(t)
		gb := ringtest.NewRig(t, b, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.Cache = ga.Cache }).Start(t)
		for i := range 300 {
			g, kms := ga, a
			if i%2 == 0 {
				g, kms = gb, b
			}
			key := fmt.Sprint(i)
			g.MustRead(t, key, kms.Encrypted(t, key, "v"), "v")
			if n := ga.Cache.Len(); n > 100 {
				t.Fatalf("%d seeds in a cache for 100", n)
			}
		}
		// A seed in use stays, though its reads do not go through the cache's lock.
		hot := a.Encrypted(t, "hot", "v")
		ga.MustRead(t, "hot", hot, "v")
		a.Set(func() { a.Calls = map[string]int{} })
		for i := range 300 {
			key := fmt.Sprint("x", i)
			ga.MustRead(t, key, a.Encrypted(t, key, "v"), "v")
			ga.MustRead(t, "hot", hot, "v")
			time.Sleep(time.Second)
		}
		if n := a.Count("Decrypt"); n != 300 {
			t.Errorf("%d Decrypt calls for 300 cold seeds and a hot one", n)
		}
	})
}

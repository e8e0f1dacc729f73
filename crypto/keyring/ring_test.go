package keyring

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestMintOnceThenSealAndOpen(t *testing.T) {
	for name, gen := range map[string]bool{"Encrypt": false, "GenerateDataKey": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := newKMS(t, "ack")
				g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) {
					if gen {
						c.KMS = &keyMaker{fakeKMS: kms}
					}
				}).start(t)
				for range 100 {
					stored := g.mustSeal(t, "/s/a", "value")
					if !strings.HasPrefix(string(stored), "k8s:enc:kms:v2:ack:") || strings.Contains(string(stored), "value") {
						t.Fatalf("stored %q", stored)
					}
					g.mustOpen(t, "/s/a", stored, "value")
				}
				if n := kms.count(name); n != 1 {
					t.Errorf("%d calls of %s for one DEK seed", n, name)
				}
				if n := kms.count("Decrypt"); n != 0 {
					t.Errorf("own values cost %d Decrypt calls", n)
				}
				synctest.Wait()
				want := State{Provider: "ack", Healthy: true, CanSeal: true, KeyID: "key-1", SealedBy: "key-1", LastGood: time.Now(), Seeded: time.Now()}
				if got := g.State(); got != want {
					t.Errorf("State = %+v, want %+v", got, want)
				}
				if err := g.sealer.Health(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestSealWaitsForTheFirstMint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.delay = 2 * time.Second
		g := newRing(t, kms, nil)
		errs := make(chan error, 100)
		for range cap(errs) { // before Run has begun
			go func() { _, err := g.seal("k", "v"); errs <- err }()
		}
		ctx, cancel := context.WithTimeoutCause(context.Background(), time.Second, errors.New("enough"))
		defer cancel()
		g.start(t)
		if _, err := g.sealer.Seal(ctx, []byte("k"), nil); !strings.Contains(errors.Unwrap(err).Error(), "enough") {
			t.Errorf("the caller's own deadline: %v", err)
		} else {
			wantKind(t, err, Unavailable)
		}
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if n := kms.count("Encrypt"); n != 1 {
			t.Errorf("%d DEK seeds generated", n)
		}
	})
}

func TestStartsWithTheKMSDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.down = kmsError("Status", kmsclient.Unreachable)
		old := kms.sealed(t, "k", "old")
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		before := time.Now()
		_, err := g.seal("k", "v")
		wantKind(t, err, Unavailable)
		for _, part := range []string{`rule "/s/"`, `"ack"`, "unreachable", `"req-7"`, `"key-1"`} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("the text does not hold %s: %v", part, err)
			}
		}
		_, err = g.open("k", old)
		wantKind(t, err, Unavailable)
		if waited := time.Since(before); waited > 0 {
			t.Errorf("it took %v to say so", waited)
		}
		if st := g.State(); st.Healthy || st.CanSeal || st.Reason == "" {
			t.Errorf("State = %+v", st)
		}
		if g.sealer.Health() == nil {
			t.Error("ready without a seed")
		}
		// Plaintext is none of the KMS' business.
		g.mustOpen(t, "k", []byte("plain"), "plain")
		kms.set(func() { kms.down = nil })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		g.mustOpen(t, "k", g.mustSeal(t, "k", "v"), "v")
		g.mustOpen(t, "k", old, "old")
	})
}

func TestSealPokesASilentRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.down = kmsError("Status", kmsclient.Unreachable)
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.FailingPollInterval, c.RevokeWithin = time.Hour, time.Hour }).start(t)
		synctest.Wait()
		kms.set(func() { kms.down = nil })
		if _, err := g.seal("k", "v"); err == nil {
			t.Fatal("sealed before the next contact")
		}
		time.Sleep(time.Second + time.Millisecond)
		g.mustSeal(t, "k", "v")
	})
}

// TestPokesAreBounded: however many want to seal, the KMS is asked once a second at most.
func TestPokesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.down = kmsError("Status", kmsclient.Unreachable)
		g := newRing(t, kms, nil).start(t)
		end := time.Now().Add(30 * time.Second)
		for time.Now().Before(end) {
			_, err := g.seal("k", "v")
			wantKind(t, err, Unavailable)
			time.Sleep(10 * time.Millisecond)
		}
		if n := kms.count("Status"); n > 31 {
			t.Errorf("%d Status calls in 30 s", n)
		}
	})
}

func TestPollIntervals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		time.Sleep(time.Hour)
		if n := kms.count("Status"); n < 60 || n > 70 {
			t.Errorf("%d Status calls in a healthy hour", n)
		}
		kms.set(func() { kms.health = "poorly"; kms.calls = map[string]int{} })
		time.Sleep(time.Hour)
		if n := kms.count("Status"); n < 350 || n > 400 {
			t.Errorf("%d Status calls in a failing hour", n)
		}
		if st := g.State(); st.Healthy || !strings.Contains(st.Reason, "health is not ok") {
			t.Errorf("State = %+v", st)
		}
		if n := kms.count("Encrypt"); n != 0 {
			t.Errorf("%d DEK seeds generated", n)
		}
	})
	synctest.Test(t, func(t *testing.T) { // RevokeWithin shortens it
		kms := newKMS(t, "ack")
		newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.RevokeWithin = time.Second }).start(t)
		time.Sleep(time.Minute)
		if n := kms.count("Status"); n < 60 {
			t.Errorf("%d Status calls in a minute", n)
		}
	})
}

func TestSealUnreachableFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		g.mustSeal(t, "k", "v")
		kms.set(func() { kms.down = kmsError("Status", kmsclient.Unreachable) })
		time.Sleep(58 * time.Minute)
		stored := g.mustSeal(t, "k", "v")
		if st := g.State(); st.Healthy || !st.CanSeal || g.sealer.Health() != nil {
			t.Errorf("State = %+v, Ready = %v", st, g.sealer.Health())
		}
		time.Sleep(5 * time.Minute)
		_, err := g.seal("k", "v")
		wantKind(t, err, Unavailable)
		if !strings.Contains(err.Error(), "1h0m0s only") {
			t.Errorf("text: %v", err)
		}
		if g.State().CanSeal || g.sealer.Health() == nil {
			t.Error("ready although it cannot seal")
		}
		g.mustOpen(t, "k", stored, "v") // reading has its own rule
		kms.set(func() { kms.down = nil })
		time.Sleep(10 * time.Second)
		g.mustSeal(t, "k", "v")
		if n := kms.count("Encrypt"); n != 1 {
			t.Errorf("%d DEK seeds generated: an outage is no reason for a new seed", n)
		}
	})
	synctest.Test(t, func(t *testing.T) { // not at all
		kms := newKMS(t, "ack")
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.SealUnreachableFor = 0 }).start(t)
		g.mustSeal(t, "k", "v")
		kms.set(func() { kms.down = kmsError("Status", kmsclient.Unreachable) })
		time.Sleep(time.Minute)
		synctest.Wait()
		_, err := g.seal("k", "v")
		wantKind(t, err, Unavailable)
	})
}

func TestRunEndsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		kms.delay = time.Hour
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.Timeout = 2 * time.Hour }).start(t)
		errs := make(chan error, 2)
		go func() { _, err := g.seal("k", "v"); errs <- err }()
		go func() { _, err := g.open("k", stored); errs <- err }()
		synctest.Wait()
		began := time.Now()
		g.stop()
		for range 2 {
			wantKind(t, <-errs, Unavailable)
		}
		if d := time.Since(began); d > 0 {
			t.Errorf("it took %v to end", d)
		}
		_, err := g.open("k", stored)
		wantKind(t, err, Unavailable)
		if err := g.Run(context.Background()); err == nil {
			t.Error("ran twice")
		}
	})
}

func TestNewChecks(t *testing.T) {
	kms := newKMS(t, "ack")
	cache, err := NewCache(CacheConfig{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]RingConfig{
		"no provider": {KMS: kms, Cache: cache}, "colon": {Provider: "a:b", KMS: kms, Cache: cache}, "no KMS": {Provider: "a", Cache: cache},
		"no cache": {Provider: "a", KMS: kms}, "negative": {Provider: "a", KMS: kms, Cache: cache, MaxAge: -1},
		"negative limit": {Provider: "a", KMS: kms, Cache: cache, SealUnreachableFor: -1},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for _, c := range []CacheConfig{{Seeds: -1}, {TTL: -1}, {ServeUnreachableFor: -1}} {
		if _, err := NewCache(c); err == nil {
			t.Errorf("%+v: no error", c)
		}
	}
}

// TestAnnotationsComeBack: what the KMS says beside a wrapped seed reaches it again, through the
// stored bytes alone.
func TestAnnotationsComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.annotate = map[string][]byte{"a.example.com": []byte("x"), "b.example.com": []byte("\x00\xff")}
		g := newRing(t, kms, nil).start(t)
		stored := g.mustSeal(t, "k", "v")
		other := newRing(t, kms, nil).start(t)
		other.mustOpen(t, "k", stored, "v")
		_, object, _ := envelope.Split(stored)
		if o, err := envelope.Parse(object); err != nil || len(o.Annotations) != 2 {
			t.Errorf("%+v, %v", o.Header, err)
		}
		if n := kms.count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
	})
}

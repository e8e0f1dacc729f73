package keyring_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestMintOnceThenSealAndOpen(t *testing.T) {
	for name, gen := range map[string]bool{"Encrypt": false, "GenerateDataKey": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := ringtest.NewKMS(t, "ack")
				g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
					if gen {
						c.KMS = &ringtest.KeyMaker{KMS: kms}
					}
				}).Start(t)
				for range 100 {
					stored := g.MustWrite(t, "/s/a", "value")
					if !strings.HasPrefix(string(stored), "k8s:enc:kms:v2:ack:") || strings.Contains(string(stored), "value") {
						t.Fatalf("stored %q", stored)
					}
					g.MustRead(t, "/s/a", stored, "value")
				}
				if n := kms.Count(name); n != 1 {
					t.Errorf("%d calls of %s for one DEK seed", n, name)
				}
				if n := kms.Count("Decrypt"); n != 0 {
					t.Errorf("own values cost %d Decrypt calls", n)
				}
				synctest.Wait()
				want := keyring.State{Provider: "ack", Healthy: true, CanSeal: true, KeyID: "key-1", SealedBy: "key-1", LastGood: time.Now(), Seeded: time.Now()}
				if got := g.State(); got != want {
					t.Errorf("State = %+v, want %+v", got, want)
				}
				if err := g.Sealer.Health(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestSealWaitsForTheFirstMint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.Delay = 2 * time.Second
		g := ringtest.NewRig(t, kms, nil)
		errs := make(chan error, 100)
		for range cap(errs) { // before Run has begun
			go func() { _, err := g.Write("k", "v"); errs <- err }()
		}
		ctx, cancel := context.WithTimeoutCause(context.Background(), time.Second, errors.New("enough"))
		defer cancel()
		g.Start(t)
		if _, err := g.Sealer.Seal(ctx, []byte("k"), nil); !strings.Contains(errors.Unwrap(err).Error(), "enough") {
			t.Errorf("the caller's own deadline: %v", err)
		} else {
			ringtest.WantKind(t, err, keyring.Unavailable)
		}
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if n := kms.Count("Encrypt"); n != 1 {
			t.Errorf("%d DEK seeds generated", n)
		}
	})
}

func TestStartsWithTheKMSDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.Down = ringtest.KMSError("Status", kmsclient.Unreachable)
		old := kms.Encrypted(t, "k", "old")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		before := time.Now()
		_, err := g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
		for _, part := range []string{`rule "/s/"`, `"ack"`, "unreachable", `"req-7"`, `"key-1"`} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("the text does not hold %s: %v", part, err)
			}
		}
		_, err = g.Read("k", old)
		ringtest.WantKind(t, err, keyring.Unavailable)
		if waited := time.Since(before); waited > 0 {
			t.Errorf("it took %v to say so", waited)
		}
		if st := g.State(); st.Healthy || st.CanSeal || st.Reason == "" {
			t.Errorf("State = %+v", st)
		}
		if g.Sealer.Health() == nil {
			t.Error("ready without a seed")
		}
		// Plaintext is none of the KMS' business.
		g.MustRead(t, "k", []byte("plain"), "plain")
		kms.Set(func() { kms.Down = nil })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		g.MustRead(t, "k", g.MustWrite(t, "k", "v"), "v")
		g.MustRead(t, "k", old, "old")
	})
}

func TestSealPokesASilentRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.Down = ringtest.KMSError("Status", kmsclient.Unreachable)
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
			c.FailingPollInterval, c.RevokeWithin = time.Hour, time.Hour
		}).Start(t)
		synctest.Wait()
		kms.Set(func() { kms.Down = nil })
		if _, err := g.Write("k", "v"); err == nil {
			t.Fatal("sealed before the next contact")
		}
		time.Sleep(time.Second + time.Millisecond)
		g.MustWrite(t, "k", "v")
	})
}

// TestPokesAreBounded: however many want to seal, the KMS is asked once a second at most.
func TestPokesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.Down = ringtest.KMSError("Status", kmsclient.Unreachable)
		g := ringtest.NewRig(t, kms, nil).Start(t)
		end := time.Now().Add(30 * time.Second)
		for time.Now().Before(end) {
			_, err := g.Write("k", "v")
			ringtest.WantKind(t, err, keyring.Unavailable)
			time.Sleep(10 * time.Millisecond)
		}
		if n := kms.Count("Status"); n > 31 {
			t.Errorf("%d Status calls in 30 s", n)
		}
	})
}

func TestPollIntervals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		time.Sleep(time.Hour)
		if n := kms.Count("Status"); n < 60 || n > 70 {
			t.Errorf("%d Status calls in a healthy hour", n)
		}
		kms.Set(func() { kms.Health = "poorly"; kms.Calls = map[string]int{} })
		time.Sleep(time.Hour)
		if n := kms.Count("Status"); n < 350 || n > 400 {
			t.Errorf("%d Status calls in a failing hour", n)
		}
		if st := g.State(); st.Healthy || !strings.Contains(st.Reason, "health is not ok") {
			t.Errorf("State = %+v", st)
		}
		if n := kms.Count("Encrypt"); n != 0 {
			t.Errorf("%d DEK seeds generated", n)
		}
	})
	synctest.Test(t, func(t *testing.T) { // RevokeWithin shortens it
		kms := ringtest.NewKMS(t, "ack")
		ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.RevokeWithin = time.Second }).Start(t)
		time.Sleep(time.Minute)
		if n := kms.Count("Status"); n < 60 {
			t.Errorf("%d Status calls in a minute", n)
		}
	})
}

func TestSealUnreachableFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		g.MustWrite(t, "k", "v")
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
		time.Sleep(58 * time.Minute)
		stored := g.MustWrite(t, "k", "v")
		if st := g.State(); st.Healthy || !st.CanSeal || g.Sealer.Health() != nil {
			t.Errorf("State = %+v, Ready = %v", st, g.Sealer.Health())
		}
		time.Sleep(5 * time.Minute)
		_, err := g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
		if !strings.Contains(err.Error(), "1h0m0s only") {
			t.Errorf("text: %v", err)
		}
		if g.State().CanSeal || g.Sealer.Health() == nil {
			t.Error("ready although it cannot seal")
		}
		g.MustRead(t, "k", stored, "v") // reading has its own rule
		kms.Set(func() { kms.Down = nil })
		time.Sleep(10 * time.Second)
		g.MustWrite(t, "k", "v")
		if n := kms.Count("Encrypt"); n != 1 {
			t.Errorf("%d DEK seeds generated: an outage is no reason for a new seed", n)
		}
	})
	synctest.Test(t, func(t *testing.T) { // not at all
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.SealUnreachableFor = 0 }).Start(t)
		g.MustWrite(t, "k", "v")
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
		time.Sleep(time.Minute)
		synctest.Wait()
		_, err := g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
	})
}

func TestRunEndsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		kms.Delay = time.Hour
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.Timeout = 2 * time.Hour }).Start(t)
		errs := make(chan error, 2)
		go func() { _, err := g.Write("k", "v"); errs <- err }()
		go func() { _, err := g.Read("k", stored); errs <- err }()
		synctest.Wait()
		began := time.Now()
		g.Stop()
		for range 2 {
			ringtest.WantKind(t, <-errs, keyring.Unavailable)
		}
		if d := time.Since(began); d > 0 {
			t.Errorf("it took %v to end", d)
		}
		_, err := g.Read("k", stored)
		ringtest.WantKind(t, err, keyring.Unavailable)
		if err := g.Run(context.Background()); err == nil {
			t.Error("ran twice")
		}
	})
}

func TestNewChecks(t *testing.T) {
	kms := ringtest.NewKMS(t, "ack")
	cache, err := keyring.NewCache(keyring.CacheConfig{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]keyring.RingConfig{
		"no provider": {KMS: kms, Cache: cache}, "colon": {Provider: "a:b", KMS: kms, Cache: cache}, "no KMS": {Provider: "a", Cache: cache},
		"no cache": {Provider: "a", KMS: kms}, "negative": {Provider: "a", KMS: kms, Cache: cache, MaxAge: -1},
		"negative limit": {Provider: "a", KMS: kms, Cache: cache, SealUnreachableFor: -1},
	} {
		if _, err := keyring.New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for _, c := range []keyring.CacheConfig{{Seeds: -1}, {TTL: -1}, {ServeUnreachableFor: -1}} {
		if _, err := keyring.NewCache(c); err == nil {
			t.Errorf("%+v: no error", c)
		}
	}
}

// TestAnnotationsComeBack: what the KMS says beside a wrapped seed reaches it again, through the
// stored bytes alone.
func TestAnnotationsComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.Annotate = map[string][]byte{"a.example.com": []byte("x"), "b.example.com": []byte("\x00\xff")}
		g := ringtest.NewRig(t, kms, nil).Start(t)
		stored := g.MustWrite(t, "k", "v")
		other := ringtest.NewRig(t, kms, nil).Start(t)
		other.MustRead(t, "k", stored, "v")
		_, object, _ := envelope.Split(stored)
		if o, err := envelope.Parse(object); err != nil || len(o.Annotations) != 2 {
			t.Errorf("%+v, %v", o.Header, err)
		}
		if n := kms.Count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls", n)
		}
	})
}

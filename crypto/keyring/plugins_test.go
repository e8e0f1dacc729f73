package keyring_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// pluginRig is a ring over a public plugin as it behaves, through the client that the proxy calls
// it with.
type pluginRig struct {
	*ringtest.Rig
	plugin *kmstest.Persona
}

func newPluginRig(t *testing.T, plugin *kmstest.Persona, change func(*keyring.RingConfig, *keyring.CacheConfig)) *pluginRig {
	t.Helper()
	client, err := kmsclient.New(kmsclient.Config{Name: "p", Backend: plugin})
	if err != nil {
		t.Fatal(err)
	}
	kms := &ringtest.KMS{Name: "p"}
	return &pluginRig{plugin: plugin, Rig: ringtest.NewRig(t, kms, func(rc *keyring.RingConfig, cc *keyring.CacheConfig) {
		rc.KMS = client
		rc.SealUnreachableFor = 0 // writers need the KMS
		if change != nil {
			change(rc, cc)
		}
	})}
}

// stored returns a value under the plugin's current key version, with a seed of its own.
func (g *pluginRig) stored(t *testing.T, key, value string) []byte {
	t.Helper()
	secret := make([]byte, envelope.SeedSize)
	_, _ = rand.Read(secret)
	res, err := g.plugin.Encrypt(context.Background(), "test", secret)
	if err != nil {
		t.Fatal(err)
	}
	seed, err := envelope.NewSeed(envelope.TypeSeed, secret)
	if err != nil {
		t.Fatal(err)
	}
	frame, err := envelope.NewFrame("p", envelope.Header{Type: envelope.TypeSeed, KeyID: res.KeyID, Source: res.Ciphertext, Annotations: res.Annotations}, seed)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := frame.Seal(nil, []byte(key), []byte(value))
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// damaged returns a value whose wrapped seed is not what the plugin wrapped.
func (g *pluginRig) damaged(t *testing.T, key string) []byte {
	t.Helper()
	_, object, _ := envelope.Split(g.stored(t, key, "damaged"))
	o, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	o.Source = bytes.Clone(o.Source)
	o.Source[len(o.Source)/2] ^= 1
	bad, err := o.Append([]byte("k8s:enc:kms:v2:p:"))
	if err != nil {
		t.Fatal(err)
	}
	return bad
}

// usable calls f with each plugin that can be used.
func usable(t *testing.T, f func(t *testing.T, p kmstest.Personality)) {
	for _, p := range kmstest.Personalities() {
		if p.Unusable == "" {
			t.Run(p.Name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { f(t, p) }) })
		}
	}
}

// TestReaderOfARefusedValue reads one all the time, behind each plugin. The plugin is called four
// times in the first minute, and once more by the first call's second attempt, and once in each
// later minute, and nobody who writes, or reads another value, notices.
func TestReaderOfARefusedValue(t *testing.T) {
	usable(t, func(t *testing.T, p kmstest.Personality) {
		g := newPluginRig(t, kmstest.NewPersona(p), nil)
		bad, good := g.damaged(t, "bad"), g.stored(t, "good", "v")
		g.Start(t)
		synctest.Wait()
		decrypts, polls := g.plugin.Calls("Decrypt"), g.plugin.Calls("Status")
		for minute := range 10 {
			for range 60 {
				for range 10 {
					_, err := g.Read("bad", bad)
					if p.Garbage {
						ringtest.WantKind(t, err, keyring.Corrupt)
					} else {
						ringtest.WantKind(t, err, keyring.SeedRefused)
					}
				}
				g.MustWrite(t, "k", "v")
				g.MustRead(t, "good", good, "v")
				time.Sleep(time.Second)
			}
			if n := g.plugin.Refused(); n > 5+minute {
				t.Fatalf("the refused seed: %d Decrypt calls in %d minutes", n, minute+1)
			}
			// Of a health check the seed in use is unwrapped once at most; good is read once.
			others := g.plugin.Calls("Decrypt") - decrypts - g.plugin.Refused()
			if polls := g.plugin.Calls("Status") - polls; others > polls+1 {
				t.Fatalf("other seeds: %d Decrypt calls in %d minutes with %d Status calls", others, minute+1, polls)
			}
		}
	})
}

// TestReaderAtTheStart is there before the proxy has a seed, and reads many refused values. The
// proxy gets one all the same.
func TestReaderAtTheStart(t *testing.T) {
	usable(t, func(t *testing.T, p kmstest.Personality) {
		plugin := kmstest.NewPersona(p)
		g := newPluginRig(t, plugin, nil)
		var refused [][]byte
		for range 100 {
			refused = append(refused, g.damaged(t, "bad"))
		}
		// the plugin says that it is not healthy from before the start, and stays so
		for _, v := range refused {
			_, _ = g.Read("bad", v)
		}
		g.Start(t)
		for i := range 120 {
			_, _ = g.Read("bad", refused[i%len(refused)])
			time.Sleep(500 * time.Millisecond)
		}
		g.MustWrite(t, "k", "v")
		for i := range 1200 {
			_, _ = g.Read("bad", refused[i%len(refused)])
			g.MustWrite(t, "k", "v")
			time.Sleep(500 * time.Millisecond)
		}
	})
}

// TestSlowRefusals: a plugin that tries a refused seed again itself for longer than the proxy waits
// does not open the circuit for writers, and is not asked for ever.
func TestSlowRefusals(t *testing.T) {
	usable(t, func(t *testing.T, p kmstest.Personality) {
		if p.Garbage {
			return // it refuses nothing
		}
		plugin := kmstest.NewPersona(p)
		g := newPluginRig(t, plugin, nil)
		bad := g.damaged(t, "bad")
		plugin.SetSlowRefusals(10 * time.Second)
		g.Start(t)
		synctest.Wait()
		g.MustWrite(t, "k", "v")
		for range 5 {
			_, _ = g.Read("bad", bad)
			time.Sleep(6 * time.Second)
			g.MustWrite(t, "k", "v")
		}
		_, err := g.Read("bad", bad)
		ringtest.WantKind(t, err, keyring.SeedRefused)
		plugin.Rotate()
		plugin.Restart()
		time.Sleep(time.Minute)
		_, _ = g.Read("bad", bad)
		if v := g.MustWrite(t, "k", "v"); ringtest.KeyIDOf(t, v) == ringtest.KeyIDOf(t, bad) {
			t.Error("no seed under the new key version")
		}
	})
}

// TestOutageBehindPlugins counts what the vendor is asked in 120 s without an answer: what Status
// costs, in no more polls than kube-apiserver makes, and hardly more.
func TestOutageBehindPlugins(t *testing.T) {
	apiServer := map[string]int{ // as it was measured
		"aws-encryption-provider": 9, "vault-kubernetes-kms": 24, "k8s-cloudkms-plugin": 12, "azure-kubernetes-kms": 12, "okms": 60, "barbican-kms-plugin": 0,
	}
	usable(t, func(t *testing.T, p kmstest.Personality) {
		plugin := kmstest.NewPersona(p)
		g := newPluginRig(t, plugin, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.SealUnreachableFor = time.Hour }).Start(t)
		g.MustWrite(t, "k", "v")
		time.Sleep(5*time.Minute + 10*time.Second)
		synctest.Wait()
		plugin.SetOutage(true)
		vendor, status, decrypt := plugin.VendorCalls(), plugin.Calls("Status"), plugin.Calls("Decrypt")
		time.Sleep(120 * time.Second)
		synctest.Wait()
		vendor, status, decrypt = plugin.VendorCalls()-vendor, plugin.Calls("Status")-status, plugin.Calls("Decrypt")-decrypt
		t.Logf("%d Status and %d Decrypt calls, %d at the vendor", status, decrypt, vendor)
		limit := 13 // one each 9 to 10 s, and the first one's other attempt
		if status > limit {
			t.Errorf("%d Status calls", status)
		}
		// Status does not ask the vendor: only the seed in use shows the outage
		if p.Name == "barbican-kms-plugin" {
			if decrypt > limit {
				t.Errorf("%d Decrypt calls", decrypt)
			}
		} else if decrypt > 4 {
			t.Errorf("%d Decrypt calls", decrypt)
		}
		if most, ok := apiServer[p.Name]; ok && most > 0 && vendor > most+10 {
			t.Errorf("%d calls at the vendor; kube-apiserver makes %d", vendor, most)
		}
		g.MustWrite(t, "k", "v")
		plugin.SetOutage(false)
		time.Sleep(45 * time.Second)
		synctest.Wait()
		if st := g.State(); !st.Healthy {
			t.Errorf("45 s after the outage: %s", st.Reason)
		}
	})
}

// TestOldKeyIsRefused: the seed of an old key is cached that the vendor has disabled. The plugin
// refuses it without a reason, and the proxy's own probes must not keep it from being healthy.
func TestOldKeyIsRefused(t *testing.T) {
	for _, poll := range []time.Duration{time.Minute, 10 * time.Second} {
		t.Run(poll.String(), func(t *testing.T) {
			usable(t, func(t *testing.T, p kmstest.Personality) {
				plugin := kmstest.NewPersona(p)
				g := newPluginRig(t, plugin, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.PollInterval = poll })
				old := g.stored(t, "old", "v")
				g.Start(t)
				g.MustRead(t, "old", old, "v")
				plugin.Rotate()
				time.Sleep(2 * time.Minute)
				plugin.Disable(ringtest.KeyIDOf(t, old))
				time.Sleep(time.Minute)
				plugin.SetOutage(true)
				time.Sleep(2 * time.Minute)
				plugin.SetOutage(false)
				time.Sleep(time.Minute)
				synctest.Wait()
				before := plugin.Calls("Decrypt")
				healthy, polls := 0, plugin.Calls("Status")
				for range 600 {
					g.MustWrite(t, "k", "v")
					// which the cache allows: no plugin says that the key is disabled
					g.MustRead(t, "old", old, "v")
					if g.State().Healthy {
						healthy++
					}
					time.Sleep(time.Second)
				}
				if healthy < 480 {
					t.Errorf("healthy in %d of 600 seconds", healthy)
				}
				polls = plugin.Calls("Status") - polls
				if n := plugin.Calls("Decrypt") - before; n > polls+10 {
					t.Errorf("%d Decrypt calls in %d polls", n, polls)
				}
			})
		})
	}
}

// TestStatusLagsBehind: a plugin names the key after a start, and its version after a call. That is
// no rotation, and no value is out of date for it.
func TestStatusLagsBehind(t *testing.T) {
	usable(t, func(t *testing.T, p kmstest.Personality) {
		plugin := kmstest.NewPersona(p)
		g := newPluginRig(t, plugin, nil).Start(t)
		v := g.MustWrite(t, "k", "v")
		for range 3 {
			plugin.Restart()
			time.Sleep(3 * time.Minute)
			synctest.Wait()
			if got := ringtest.StateOf(t, g.Sealer, "k", v); got != keyring.Current {
				t.Errorf("the value is %v", got)
			}
		}
		if n := g.Events.Get("p " + string(keyring.EventGenerated)); n != 1 {
			t.Errorf("%d seeds", n)
		}
		// A command that only looks, just after a restart.
		plugin.Restart()
		look := newPluginRig(t, plugin, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.ReadOnly = true })
		sealer, err := rule.New(rule.Config{Prefix: "/s/", Write: look.Ring, AllowPlaintextReads: true, InspectOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		look.Start(t)
		if err := look.WaitForCheck(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got := ringtest.StateOf(t, sealer, "k", v); got != keyring.Current {
			t.Errorf("to a command, the value is %v", got)
		}
		id := plugin.Rotate()
		time.Sleep(2*time.Minute + time.Second)
		synctest.Wait()
		if got := ringtest.KeyIDOf(t, g.MustWrite(t, "k", "v")); got != id {
			t.Errorf("two polls after a rotation to %s, values are under %s", id, got)
		}
	})
}

// TestLastingRefusal: the policy for values that do not open later applies where a refusal lasts,
// and not before, nor in an outage.
func TestLastingRefusal(t *testing.T) {
	usable(t, func(t *testing.T, p kmstest.Personality) {
		plugin, log := kmstest.NewPersona(p), new(ringtest.LogBuffer)
		g := newPluginRig(t, plugin, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
			c.Logger = slog.New(slog.NewTextHandler(log, nil))
		})
		bad, good := g.damaged(t, "bad"), g.stored(t, "good", "v")
		pass := ringtest.NewRule(t, rule.Config{Write: g.Ring, Passthrough: true})
		g.Start(t)
		synctest.Wait()
		read := func(for_ time.Duration, key string, v []byte) (handedOn int) {
			for end := time.Now().Add(for_); time.Now().Before(end); time.Sleep(time.Second) {
				if got, err := ringtest.OpenBy(pass, key, v); err == nil && got == string(v) {
					handedOn++
				}
			}
			return handedOn
		}
		if n := read(4*time.Minute, "bad", bad); n > 0 && !p.Garbage {
			t.Errorf("handed on %d times in four minutes", n)
		}
		read(3*time.Minute, "bad", bad)
		if got, err := ringtest.OpenBy(pass, "bad", bad); err != nil || got != string(bad) {
			t.Errorf("not handed on after seven minutes: %v", err)
		}
		if p.Garbage {
			return
		}
		if !strings.Contains(log.String(), "values are returned as stored") {
			t.Error("the log does not say so")
		}
		plugin.SetOutage(true)
		time.Sleep(2 * time.Minute)
		if n := read(10*time.Minute, "good", good); n > 0 {
			t.Errorf("handed on %d times in an outage", n)
		}
		plugin.SetOutage(false)
		time.Sleep(time.Minute)
		if got, err := ringtest.OpenBy(pass, "good", good); err != nil || got != "v" {
			t.Errorf("after the outage: %v", err)
		}
	})
}

// TestNothingIsHandedOnWithoutEvidence: a provider that is only read has no seed to try, and not
// every plugin's Status shows an outage.
func TestNothingIsHandedOnWithoutEvidence(t *testing.T) {
	usable(t, func(t *testing.T, p kmstest.Personality) {
		plugin := kmstest.NewPersona(p)
		g := newPluginRig(t, plugin, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.ReadOnly = true })
		good := g.stored(t, "good", "v")
		pass := ringtest.NewRule(t, rule.Config{Read: []*keyring.Ring{g.Ring}, AllowPlaintextReads: true, Passthrough: true})
		plugin.SetOutage(true)
		g.Start(t)
		for range 20 * 60 {
			if got, err := ringtest.OpenBy(pass, "good", good); err == nil {
				t.Fatalf("handed on in an outage: %d bytes", len(got))
			}
			time.Sleep(time.Second)
		}
		plugin.SetOutage(false)
		time.Sleep(2 * time.Minute)
		if got, err := ringtest.OpenBy(pass, "good", good); err != nil || got != "v" {
			t.Errorf("after the outage: %v", err)
		}
	})
}

// TestUnusablePlugins: nothing is encrypted with a plugin whose answer cannot be stored, or does
// not come back.
func TestUnusablePlugins(t *testing.T) {
	for _, p := range kmstest.Personalities() {
		if p.Unusable == "" {
			continue
		}
		synctest.Test(t, func(t *testing.T) {
			g := newPluginRig(t, kmstest.NewPersona(p), nil).Start(t)
			_, err := g.Write("k", "v")
			ringtest.WantKind(t, err, keyring.Unavailable)
			if st := g.State(); st.CanSeal || !strings.Contains(st.Reason, "the response of the KMS is wrong") {
				t.Errorf("%s: %+v", p.Name, st)
			}
		})
	}
}

// TestFlappingKeyID: Status goes back and forth between two key IDs. The proxy follows the first
// change alone, and says so.
func TestFlappingKeyID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms, log := ringtest.NewKMS(t, "ack"), new(ringtest.LogBuffer)
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
			c.Logger = slog.New(slog.NewTextHandler(log, nil))
		}).Start(t)
		g.MustWrite(t, "k", "v")
		ids := []string{"key-1", "key-2"}
		kms.Rotate("key-2")
		minute := func(id string) {
			kms.Set(func() { kms.Current = id })
			time.Sleep(time.Minute)
			synctest.Wait()
		}
		minute("key-2")
		now := g.MustWrite(t, "k", "v")
		for i := range 100 {
			minute(ids[i%2])
			if got := ringtest.StateOf(t, g.Sealer, "k", now); got != keyring.Current {
				t.Fatalf("after %d changes the value is %v", i, got)
			}
		}
		if n := g.Events.Get("ack " + string(keyring.EventGenerated)); n > 2 {
			t.Errorf("%d seeds", n)
		}
		if n := strings.Count(log.String(), "KMS key ID alternates"); n < 1 || n > 3 || g.State().Flapped.IsZero() {
			t.Errorf("the log says so %d times in 100 minutes", n)
		}
		// It stays: an hour later it counts.
		for range 62 {
			minute("key-1")
		}
		if got := ringtest.KeyIDOf(t, g.MustWrite(t, "k", "v")); got != "key-1" {
			t.Errorf("sealed under %s", got)
		}
		// A key ID that was never left counts at once, and a refusal of the one in use does not
		// wait.
		kms.Rotate("key-3")
		minute("key-3")
		if got := ringtest.KeyIDOf(t, g.MustWrite(t, "k", "v")); got != "key-3" {
			t.Errorf("sealed under %s", got)
		}
		for i, err := range []error{ringtest.KMSError("Decrypt", kmsclient.KeyDisabled), &kmsclient.Error{Op: "Decrypt", Reason: kmsclient.Failing}} {
			id := []string{"key-3", "key-4"}[i]
			kms.Rotate(id)
			minute(id)
			kms.Set(func() { kms.KeyErr[id] = err })
			minute("key-1")
			if got := ringtest.KeyIDOf(t, g.MustWrite(t, "k", "v")); got != "key-1" {
				t.Errorf("sealed under %s, which the KMS refuses", got)
			}
		}
	})
}

// TestNoConnectionIsNoRefusal: calls that were not answered at all are not remembered of the seed,
// however many there were: it opens as soon as the KMS is back.
func TestNoConnectionIsNoRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		kms.Set(func() { kms.OpErr["Decrypt"] = ringtest.KMSError("Decrypt", kmsclient.Unreachable) })
		for range 10 {
			_, err := g.Read("k", stored)
			ringtest.WantKind(t, err, keyring.Unavailable)
		}
		kms.Set(func() { kms.OpErr = map[string]error{} })
		g.MustRead(t, "k", stored, "v")
	})
}

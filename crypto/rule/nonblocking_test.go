package rule_test

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// tryOpen has the rule decrypt a value without waiting, and checks that a value which would need
// the KMS is unchanged and not counted.
func tryOpen(t *testing.T, g *ringtest.Rig, key string, stored []byte) (string, error) {
	t.Helper()
	own := bytes.Clone(stored)
	calls, misses := g.KMS.Count("Decrypt"), g.Events.Get(g.KMS.Name+" miss")
	value, err := g.Sealer.TryOpen(nil, []byte(key), own)
	if g.KMS.Count("Decrypt") != calls || g.Events.Get(g.KMS.Name+" miss") != misses {
		t.Error("TryOpen calls the KMS")
	}
	if errors.Is(err, keyring.ErrWouldBlock) && !bytes.Equal(own, stored) {
		t.Error("TryOpen changes a value that it does not decrypt")
	}
	return string(value), err
}

// TestTryOpen: a value whose seed is cached is decrypted, any other needs a call that may wait.
func TestTryOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		foreign := kms.Encrypted(t, "k", "foreign")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		own := g.MustWrite(t, "k", "own")
		for name, c := range map[string]struct{ stored, want string }{
			"encrypted here":       {string(own), "own"},
			"plaintext":            {"plain", "plain"},
			"of another provider":  {"k8s:enc:kms:v2:other:x", "k8s:enc:kms:v2:other:x"},
			"of another marker":    {"k8s:enc:x", "k8s:enc:x"},
			"the beginning of one": {"k8s:enc:kms", "k8s:enc:kms"},
		} {
			if got, err := tryOpen(t, g, "k", []byte(c.stored)); name != "the beginning of one" && (err != nil || got != c.want) {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		for range 2 {
			if got, err := tryOpen(t, g, "k", foreign); !errors.Is(err, keyring.ErrWouldBlock) {
				t.Fatalf("of a seed that is not cached: %q, %v", got, err)
			}
		}
		g.MustRead(t, "k", foreign, "foreign")
		if got, err := tryOpen(t, g, "k", foreign); err != nil || got != "foreign" {
			t.Errorf("of a seed that is cached: %q, %v", got, err)
		}
		time.Sleep(24*time.Hour + time.Second) // the TTL
		if _, err := tryOpen(t, g, "k", foreign); !errors.Is(err, keyring.ErrWouldBlock) {
			t.Errorf("of a seed past its TTL: %v", err)
		}
		_, err := tryOpen(t, g, "k", own[:len(own)-1])
		ringtest.WantKind(t, err, keyring.Corrupt)
	})
}

// TestTryOpenAgreesWithOpen: what TryOpen decrypts with a seed at hand, it decrypts, refuses and
// counts as Open does.
func TestTryOpenAgreesWithOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		own, foreign := g.MustWrite(t, "k", "own"), kms.Encrypted(t, "k", "foreign")
		g.MustRead(t, "k", foreign, "foreign")
		head, tail := bytes.Clone(own), bytes.Clone(own)
		head[len("k8s:enc:kms:v2:ack:")+10] ^= 1
		tail[len(tail)-1] = 7 // the type
		type result struct {
			value, err string
			counts     map[string]int
		}
		read := func(open func() ([]byte, error)) (r result) {
			g.Events.Counts = nil
			value, err := open()
			return result{string(value), fmt.Sprint(err), g.Events.Counts}
		}
		for name, c := range map[string]struct {
			key    string
			stored []byte
		}{
			"encrypted here": {"k", own}, "with another seed": {"k", foreign}, "an empty value": {"k", g.MustWrite(t, "k", "")},
			"moved": {"l", own}, "changed data": {"k", head}, "changed header": {"k", tail}, "cut": {"k", own[:len(own)-3]},
		} {
			for _, dst := range [][]byte{nil, {}, []byte("before ")} {
				want := read(func() ([]byte, error) { return g.Sealer.Open(t.Context(), dst, []byte(c.key), c.stored) })
				for range 3 { // with a cached cipher, too
					if got := read(func() ([]byte, error) { return g.Sealer.TryOpen(dst, []byte(c.key), c.stored) }); !reflect.DeepEqual(got, want) {
						t.Errorf("%s, after %q: %+v, want %+v", name, dst, got, want)
					}
				}
			}
		}
	})
}

// TestTryOpenUnverified: a value that does not decrypt with a seed which has decrypted none yet is
// left for a call that may ask the KMS again.
func TestTryOpenUnverified(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		g.MustWrite(t, "k", "v")
		stored := kms.Encrypted(t, "k", "v")
		kms.Set(func() {
			kms.Result = func(b []byte) []byte { b = bytes.Clone(b); b[0]++; return b }
		})
		_, err := g.Read("k", stored)
		ringtest.WantKind(t, err, keyring.Corrupt)
		_, err = tryOpen(t, g, "k", stored)
		ringtest.WantKind(t, err, keyring.Corrupt) // for a time, without a call
		time.Sleep(time.Minute)
		kms.Set(func() { kms.Result = nil })
		if _, err := tryOpen(t, g, "k", stored); !errors.Is(err, keyring.ErrWouldBlock) {
			t.Errorf("a seed that may be another one by now: %v", err)
		}
		if got, err := g.Sealer.Open(t.Context(), nil, []byte("k"), bytes.Clone(stored)); err != nil || string(got) != "v" {
			t.Errorf("in place, with the other secret: %q, %v", got, err)
		}
	})
}

// TestTryWithoutTheKMS: while the KMS does not answer, a seed past its TTL is used at once; once
// the key is revoked, the error is final.
func TestTryWithoutTheKMS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.ReadOnly = true }).Start(t)
		stored := kms.Encrypted(t, "k", "v")
		g.MustRead(t, "k", stored, "v")
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
		time.Sleep(25 * time.Hour)
		for range 2 {
			own := bytes.Clone(stored)
			if got, err := g.Sealer.TryOpen(nil, []byte("k"), own); err != nil || string(got) != "v" {
				t.Fatalf("%q, %v", got, err)
			}
			synctest.Wait()
		}
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(2 * time.Minute)
		_, err := tryOpen(t, g, "k", stored)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
	})
}

// TestTrySeal: before the first seed is there a value would have to wait for it.
func TestTrySeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil)
		if _, err := g.Sealer.TrySeal(nil, []byte("k"), []byte("v")); !errors.Is(err, keyring.ErrWouldBlock) {
			t.Errorf("before the first contact: %v", err)
		}
		g.Start(t)
		g.MustWrite(t, "k", "v")
		stored, err := g.Sealer.TrySeal(nil, []byte("k"), []byte("v"))
		if err != nil {
			t.Fatal(err)
		}
		g.MustRead(t, "k", stored, "v")
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(2 * time.Minute)
		_, err = g.Sealer.TrySeal(nil, []byte("k"), []byte("v"))
		ringtest.WantKind(t, err, keyring.KeyUnusable)
	})
}

// TestTryAllocatesNothing: beyond what is stored, and nothing at all to decrypt.
func TestTryAllocatesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		key, stored := []byte("k"), g.MustWrite(t, "k", "v")
		room := make([]byte, 0, len("v"))
		for range 3 { // the cipher of a value that is read over and over is kept
			if _, err := g.Sealer.TryOpen(room, key, stored); err != nil {
				t.Fatal(err)
			}
		}
		if n := testing.AllocsPerRun(100, func() {
			if _, err := g.Sealer.TryOpen(room, key, stored); err != nil {
				t.Error(err)
			}
		}); n > 2 { // the events' names
			t.Errorf("%v allocations", n)
		}
	})
}

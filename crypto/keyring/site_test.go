package keyring

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func goneError(op string) error {
	return &kmsclient.Error{Op: op, Reason: kmsclient.KeyGone, Code: "Forbidden.KeyNotFound", RequestID: "req-7", KeyID: "key-1"}
}

// site is providers ack and dr, ack's seeds being copied by dr, and a rule that writes with ack.
type site struct {
	ack, dr *rig
	sealer  *Sealer
	log     *logBuffer // of ack
	events  *events
}

// logBuffer is a log that is read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newSite makes a site over two KMSs with nothing cached. start runs its rings.
func newSite(t *testing.T, ack, dr *fakeKMS, required bool, change func(*RingConfig, *CacheConfig)) *site {
	t.Helper()
	s := &site{log: new(logBuffer)}
	// demanded back, and nothing else
	ack.set(func() { ack.annotate = map[string][]byte{"own.example.com": []byte("ack's")} })
	dr.set(func() { dr.annotate = map[string][]byte{"own.example.com": []byte("dr's")} })
	s.ack = newRing(t, ack, func(c *RingConfig, cc *CacheConfig) {
		if change != nil {
			change(c, cc)
		}
		c.Logger = slog.New(slog.NewTextHandler(s.log, nil))
	})
	s.dr = newRing(t, dr, func(c *RingConfig, _ *CacheConfig) { c.Cache, c.ReadOnly = s.ack.cache, true })
	s.events = s.ack.events
	if err := s.ack.SetRecovery([]*Ring{s.dr.Ring}, required); err != nil {
		t.Fatal(err)
	}
	s.sealer = rule(t, SealerConfig{Write: s.ack.Ring, Recovery: []*Ring{s.dr.Ring}, Observer: s.events})
	s.ack.sealer = s.sealer
	return s
}

func (s *site) start(t *testing.T) *site {
	t.Helper()
	s.dr.start(t)
	s.ack.start(t)
	synctest.Wait()
	return s
}

func (s *site) stop() {
	s.ack.stop()
	s.dr.stop()
}

func rule(t *testing.T, c SealerConfig) *Sealer {
	t.Helper()
	c.Prefix, c.AllowPlaintextReads = "/s/", true
	s, err := NewSealer(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func openBy(s *Sealer, key string, stored []byte) (string, error) {
	b, err := s.Open(context.Background(), []byte(key), bytes.Clone(stored))
	return string(b), err
}

func standing(t *testing.T, s *Sealer, key string, stored []byte) ValueState {
	t.Helper()
	_, st, _ := s.Inspect(context.Background(), []byte(key), stored)
	return st
}

// headerOf returns the header of a stored value.
func headerOf(t *testing.T, stored []byte) *envelope.Header {
	t.Helper()
	_, object, ok := envelope.Split(stored)
	if !ok {
		t.Fatalf("not a sealed value: %q", stored)
	}
	o, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	return &o.Header
}

const drCopy = "dr.recovery.etcd-kms-proxy.io"

// TestRecoveryUnderStress: many readers and writers while keys are lost, disabled, rotated and come
// back, and the recovery is changed. Under the race detector; a value that opens is the right one,
// and while the key is disabled for long nothing opens.
func TestRecoveryUnderStress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, func(c *RingConfig, cc *CacheConfig) { c.RevokeWithin, cc.TTL = 2*time.Second, 10*time.Second }).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		ctx, cancel := context.WithCancel(context.Background())
		var all sync.WaitGroup
		opened := make([]int, 64)
		for i := range opened {
			all.Go(func() {
				for ctx.Err() == nil {
					if got, err := s.ack.open("k", stored); err == nil {
						opened[i]++
						if got != "v" {
							t.Errorf("opened as %q", got)
						}
					}
					if v, err := s.ack.seal("k2", "w"); err == nil {
						if got, err := s.ack.open("k2", v); err == nil && got != "w" {
							t.Errorf("opened as %q", got)
						}
					}
					time.Sleep(time.Duration(100+rand.IntN(1000)) * time.Millisecond)
				}
			})
		}
		for i := range 40 {
			ack.set(func() {
				ack.down = []error{nil, goneError("Status"), kmsError("Status", kmsclient.Unreachable), kmsError("Status", kmsclient.KeyDisabled)}[rand.IntN(4)]
			})
			dr.set(func() { dr.down = []error{nil, nil, kmsError("Status", kmsclient.Unreachable)}[rand.IntN(3)] })
			if i%7 == 0 {
				ack.rotate(fmt.Sprint("key-r", i))
			}
			if i%5 == 0 {
				if err := s.ack.SetRecovery([]*Ring{s.dr.Ring}[:i/5%2], i%2 == 0); err != nil {
					t.Error(err)
				}
			}
			time.Sleep(time.Duration(rand.IntN(6000)) * time.Millisecond)
		}
		ack.set(func() { ack.down = kmsError("Status", kmsclient.KeyDisabled) })
		dr.set(func() { dr.down = nil })
		time.Sleep(15 * time.Second)
		if _, err := s.ack.open("k", stored); err == nil {
			t.Error("a disabled key opens values")
		}
		ack.set(func() { ack.down = goneError("Status") })
		time.Sleep(15 * time.Second)
		s.ack.mustOpen(t, "k", stored, "v")
		cancel()
		all.Wait()
		for i, n := range opened {
			if n == 0 {
				t.Errorf("reader %d never opened anything", i)
			}
		}
	})
}

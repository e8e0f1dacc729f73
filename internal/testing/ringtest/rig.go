package ringtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
)

// Events counts what an Observer is told.
type Events struct {
	mu     sync.Mutex
	Counts map[string]int
}

func (e *Events) add(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.Counts == nil {
		e.Counts = map[string]int{}
	}
	e.Counts[name]++
}

func (e *Events) Get(name string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.Counts[name]
}

func (e *Events) Sealed(rule string, o rule.Outcome)        { e.add("sealed " + rule + " " + string(o)) }
func (e *Events) Opened(rule string, o rule.Outcome)        { e.add("opened " + rule + " " + string(o)) }
func (e *Events) Seed(provider string, event keyring.Event) { e.add(provider + " " + string(event)) }
func (e *Events) Recovered(provider, by string)             { e.add(provider + " by " + by) }
func (e *Events) CopyUnwrapped(provider, by, keyID, why string) {
	e.add(fmt.Sprintf("rescue %s by %s %s: %t", provider, by, keyID, why != ""))
}

var Quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// Rig is a ring over a [KMS], with a sealer that writes with it.
type Rig struct {
	*keyring.Ring
	KMS    *KMS
	Cache  *keyring.Cache
	Events *Events
	Sealer *rule.Sealer
	Stop   func()
}

func NewRig(t *testing.T, kms *KMS, change func(*keyring.RingConfig, *keyring.CacheConfig)) *Rig {
	t.Helper()
	g := &Rig{KMS: kms, Events: &Events{}}
	rc := keyring.RingConfig{Provider: kms.Name, KMS: kms, SealUnreachableFor: time.Hour, Observer: g.Events, Logger: Quiet}
	cc := keyring.CacheConfig{ServeUnreachableFor: 24 * time.Hour}
	if change != nil {
		change(&rc, &cc)
	}
	var err error
	if rc.Cache == nil {
		if rc.Cache, err = keyring.NewCache(cc); err != nil {
			t.Fatal(err)
		}
	}
	g.Cache = rc.Cache
	if g.Ring, err = keyring.New(rc); err != nil {
		t.Fatal(err)
	}
	sc := rule.Config{Prefix: "/s/", Write: g.Ring, AllowPlaintextReads: true, Observer: g.Events}
	if rc.ReadOnly {
		sc.Write, sc.Read = nil, []*keyring.Ring{g.Ring}
	}
	if g.Sealer, err = rule.New(sc); err != nil {
		t.Fatal(err)
	}
	return g
}

// Start runs the ring; the test's end stops it and waits.
func (g *Rig) Start(t *testing.T) *Rig {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), OfHealthCheck{}, true))
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	var once sync.Once
	g.Stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	t.Cleanup(g.Stop)
	return g
}

func (g *Rig) Write(key, value string) ([]byte, error) {
	return g.Sealer.Seal(context.Background(), []byte(key), []byte(value))
}

func (g *Rig) Read(key string, stored []byte) (string, error) {
	b, err := g.Sealer.Open(context.Background(), nil, []byte(key), bytes.Clone(stored))
	return string(b), err
}

func (g *Rig) MustWrite(t *testing.T, key, value string) []byte {
	t.Helper()
	b, err := g.Write(key, value)
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	return b
}

func (g *Rig) MustRead(t *testing.T, key string, stored []byte, want string) {
	t.Helper()
	if got, err := g.Read(key, stored); err != nil || got != want {
		t.Fatalf("open = %q, %v, want %q", got, err, want)
	}
}

func WantKind(t *testing.T, err error, kind keyring.Kind) {
	t.Helper()
	if e, ok := errors.AsType[*keyring.Error](err); !ok || e.Kind != kind {
		t.Fatalf("error %v, want kind %v", err, kind)
	}
}

func KeyIDOf(t *testing.T, stored []byte) string {
	t.Helper()
	_, object, ok := envelope.Split(stored)
	if !ok {
		t.Fatalf("not a sealed value: %q", stored)
	}
	o, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	return o.KeyID
}

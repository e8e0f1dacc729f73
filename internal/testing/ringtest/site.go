package ringtest

import (
	"bytes"
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func GoneError(op string) error {
	return &kmsclient.Error{Op: op, Reason: kmsclient.KeyGone, Code: "Forbidden.KeyNotFound", RequestID: "req-7", KeyID: "key-1"}
}

// Site is providers ack and dr, ack's seeds being copied by dr, and a rule that writes with ack.
type Site struct {
	Ack, DR *Rig
	Sealer  *rule.Sealer
	Log     *LogBuffer // of ack
	Events  *Events
}

// LogBuffer is a log that is read while it is written.
type LogBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *LogBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *LogBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// NewSite makes a site over two KMSs with nothing cached. Start runs its rings.
func NewSite(t *testing.T, ack, dr *KMS, required bool, change func(*keyring.RingConfig, *keyring.CacheConfig)) *Site {
	t.Helper()
	s := &Site{Log: new(LogBuffer)}
	// demanded back, and nothing else
	ack.Set(func() { ack.Annotate = map[string][]byte{"own.example.com": []byte("ack's")} })
	dr.Set(func() { dr.Annotate = map[string][]byte{"own.example.com": []byte("dr's")} })
	s.Ack = NewRig(t, ack, func(c *keyring.RingConfig, cc *keyring.CacheConfig) {
		if change != nil {
			change(c, cc)
		}
		c.Logger = slog.New(slog.NewTextHandler(s.Log, nil))
	})
	s.DR = NewRig(t, dr, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.Cache, c.ReadOnly = s.Ack.Cache, true })
	s.Events = s.Ack.Events
	if err := s.Ack.SetRecovery([]*keyring.Ring{s.DR.Ring}, required); err != nil {
		t.Fatal(err)
	}
	s.Sealer = NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.DR.Ring}, Observer: s.Events})
	s.Ack.Sealer = s.Sealer
	return s
}

func (s *Site) Start(t *testing.T) *Site {
	t.Helper()
	s.DR.Start(t)
	s.Ack.Start(t)
	synctest.Wait()
	return s
}

func (s *Site) Stop() {
	s.Ack.Stop()
	s.DR.Stop()
}

func NewRule(t *testing.T, c rule.Config) *rule.Sealer {
	t.Helper()
	c.Prefix, c.AllowPlaintextReads = "/s/", true
	s, err := rule.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func OpenBy(s *rule.Sealer, key string, stored []byte) (string, error) {
	b, err := s.Open(context.Background(), nil, []byte(key), bytes.Clone(stored))
	return string(b), err
}

func StateOf(t *testing.T, s *rule.Sealer, key string, stored []byte) keyring.ValueState {
	t.Helper()
	_, st, _ := s.Inspect(context.Background(), []byte(key), stored)
	return st
}

// HeaderOf returns the header of a stored value.
func HeaderOf(t *testing.T, stored []byte) *envelope.Header {
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

const CopyByDR = "dr.recovery.etcd-kms-proxy.io"

package keyring

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// generator generates the DEK seeds that values are encrypted with, and verifies that the KMS
// unwraps them. Only the goroutine of the health checks uses it.
type generator struct {
	ring   *Ring
	p      *provider
	calls  *caller
	seeds  *seeds
	copier *copyWriter

	// pause before the next seed when the KMS wraps under another key ID than Status says
	mismatch time.Duration
	used     time.Time // when the key in use was last tried
	// the seed whose unwrapping this health check has started; nil if none
	verified *writer
	sample   *envelope.Header // of a ring for reading only: a seed that the KMS has unwrapped
}

// maxMismatch is the longest pause before a seed is generated again because of generator.mismatch.
const maxMismatch = time.Hour

// writer is a DEK seed that values are encrypted with.
type writer struct {
	frame     *envelope.Frame
	header    *envelope.Header  // for the KMS to unwrap it
	sum       [sha256.Size]byte // SHA-256 of the seed
	recovery  *copySet          // the rings that had to wrap copies
	copies    []copyID
	lacking   []missingCopy
	keyID     string // from the response that wrapped the seed: the one in the values
	statusID  string // from Status at that time
	generated time.Time
	seals     atomic.Uint64
}

// use returns the seed to encrypt with from now on, which the KMS has just unwrapped. It generates
// one if that is due. It returns nil for a ring that only reads; there it verifies a cached seed.
func (g *generator) use(ctx context.Context, keyID string) (*writer, error) {
	if !g.due(ctx, keyID) {
		w := g.p.state.Load().writer
		if w == nil {
			return nil, g.verifySample(ctx, keyID)
		}
		err := g.verify(ctx, w)
		if err == nil || kmsclient.ClassOf(err) != kmsclient.ClassInvalid && !errors.Is(err, errOtherSecret) {
			return w, err
		}
		// Values must not be encrypted with a seed that the KMS does not unwrap. Those that wait
		// get the next one.
		g.p.update(func(st *state) { st.writer = nil })
		g.p.cfg.Logger.Error("the KMS does not unwrap the DEK seed in use; another one is generated", "provider", g.p.cfg.Provider, "keyID", w.keyID, "reason", describe(err))
	}
	return g.generate(ctx, keyID)
}

// due reports whether a new seed is needed now that Status said keyID.
func (g *generator) due(ctx context.Context, keyID string) bool {
	if g.p.readOnly.Load() {
		return false
	}
	w := g.p.state.Load().writer
	if w == nil {
		return true
	}
	age := time.Since(w.generated)
	switch {
	case keyID != w.statusID:
		g.mismatch = 0
		return true
	case keyID != w.keyID && age >= g.mismatch:
		return true
	}
	return age >= g.p.cfg.MaxAge || w.seals.Load() >= g.p.cfg.MaxSeals || g.copier.due(ctx, w)
}

// generate generates a seed with one KMS call, and verifies it with a second one. The key ID in the
// KMS' response is the one in the values. If Status names another one, the KMS is being rotated, or
// its key IDs never agree: then the next seed is generated after a pause that gets longer.
func (g *generator) generate(ctx context.Context, statusID string) (*writer, error) {
	w := &writer{statusID: statusID, recovery: g.copier.set.Load()}
	if err := w.recovery.mayGenerate(); err != nil {
		return nil, fmt.Errorf("generate DEK seed: %w", err)
	}
	k, err := g.calls.dataKey(ctx)
	if err != nil {
		return nil, fmt.Errorf("generate DEK seed: %w", err)
	}
	h := envelope.Header{Type: envelope.TypeSeed, KeyID: k.KeyID, Source: k.Ciphertext, Annotations: k.Annotations}
	broken := ""
	switch err := h.Validate(); {
	case len(k.Plaintext) != envelope.SeedSize:
		broken = fmt.Sprintf("the data key has %d bytes, not %d", len(k.Plaintext), envelope.SeedSize)
	case bytes.Contains(k.Ciphertext, k.Plaintext):
		broken = "the wrapped data key holds the data key itself"
	case err != nil:
		broken = err.Error()
	case h.HasCopies():
		broken = "an annotation has a name that is reserved for recovery copies"
	}
	if broken != "" {
		return nil, brokenContract("GenerateDataKey", broken)
	}
	w.header, w.sum = cloneHeader(&h), sha256.Sum256(k.Plaintext)
	if err := g.verify(ctx, w); err != nil {
		return nil, fmt.Errorf("generate DEK seed: %w", err)
	}
	if k.KeyID != statusID { // some plugins name the key's version only after a call
		if again, err := g.calls.status(ctx); err == nil && again.KeyID == k.KeyID {
			statusID, w.statusID = again.KeyID, again.KeyID
		}
	}
	if err := w.copySeed(ctx, &h, k.Plaintext); err != nil {
		return nil, fmt.Errorf("generate DEK seed: %w", err)
	}
	seed, err := envelope.NewSeed(envelope.TypeSeed, k.Plaintext)
	if err != nil {
		return nil, fmt.Errorf("generate DEK seed: %w", err)
	}
	frame, err := envelope.NewFrame(g.p.cfg.Provider, h, seed)
	if err != nil {
		return nil, fmt.Errorf("generate DEK seed: %w", err)
	}
	w.frame, w.keyID, w.generated = frame, k.KeyID, time.Now()
	if w.keyID != statusID {
		g.mismatch = min(max(2*g.mismatch, g.p.cfg.PollInterval/2), maxMismatch)
	} else {
		g.mismatch = 0
	}
	e := g.seeds.newEntry(digestOf(g.p.cfg.Provider, &h), &h, seed)
	e.sum = w.sum
	e.verified.Store(true)
	g.p.cfg.Cache.put(e)
	g.seeds.hot.Put(frame.Rest(), e)
	g.p.cfg.Observer.Seed(g.p.cfg.Provider, EventGenerated)
	g.p.cfg.Logger.Info("DEK seed generated", "provider", g.p.cfg.Provider, "keyID", k.KeyID, slog.Bool("keyIDAsStatus", k.KeyID == statusID), "recoveryCopies", len(w.copies))
	g.copier.logLacking(w)
	return w, nil
}

// errOtherSecret says that the KMS does not unwrap what it wrapped.
var errOtherSecret = brokenContract("Decrypt", "another data key than it had wrapped")

// verify has the KMS unwrap a seed that values are encrypted with.
func (g *generator) verify(ctx context.Context, w *writer) error {
	g.verified, g.used = w, time.Now()
	plain, err := g.calls.unwrap(kmsclient.Expect(ctx, w.sum), w.header)
	switch {
	case err == nil && sha256.Sum256(plain) != w.sum, errors.Is(err, kmsclient.ErrOtherSecret):
		err = errOtherSecret
	}
	if err != nil {
		return fmt.Errorf("unwrap the seed in use: %w", err)
	}
	return nil
}

// verifySample has the KMS unwrap a cached seed of the current key, or the last one that was
// cached.
func (g *generator) verifySample(ctx context.Context, keyID string) error {
	for _, e := range g.p.cfg.Cache.lru.Values() {
		if e.unwrapper == g.ring && e.header != nil && g.p.keyOf(e.unwrapperKeyID) == g.p.keyOf(keyID) {
			g.sample = e.header
		}
	}
	h := g.sample
	if h == nil || g.p.keyOf(h.KeyID) != g.p.keyOf(keyID) {
		return nil
	}
	_, err := g.calls.unwrap(ctx, h)
	if err != nil && kmsclient.ClassOf(err) != kmsclient.ClassInvalid {
		return fmt.Errorf("unwrap a seed in use: %w", err)
	}
	return nil
}

// refuses reports whether a failed call says that the key may not be used.
func refuses(err error) bool {
	c := kmsclient.ClassOf(err)
	return c == kmsclient.ClassKeyUnusable || c == kmsclient.ClassDenied
}

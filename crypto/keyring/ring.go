package keyring

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// RingConfig configures a Ring.
type RingConfig struct {
	// Provider names the ring in every stored value. Not empty, no colon.
	Provider string
	// KMS wraps and unwraps DEK seeds. If it is a [kmsclient.DataKeyGenerator] as well, it
	// generates them; otherwise the ring generates them and has them wrapped by Encrypt.
	KMS kmsclient.Service
	// Offline makes the ring one that wraps recovery copies with public keys, and does nothing
	// else. KMS is nil then.
	Offline OfflineKey
	// Cache holds the unwrapped seeds. Rings may share it.
	Cache *Cache
	// KeyOf returns the name of the key of which a key ID names a version, see
	// [kmsclient.KeyIDParser]. nil: each key ID is a key of its own.
	KeyOf func(keyID string) string
	// ReadOnly rings decrypt and generate no seeds. They are for a provider that no rule writes
	// with, whose key may allow Decrypt only.
	ReadOnly bool

	// PollInterval is the time between health checks while they succeed; a shorter RevokeWithin
	// shortens it. 0 is a minute.
	PollInterval time.Duration
	// FailingPollInterval is the time between health checks while they fail. 0 is 10 seconds, or
	// PollInterval if that is shorter.
	FailingPollInterval time.Duration
	// RevokeWithin is how soon the seeds of a disabled key are evicted, and how long the KMS must
	// have denied access before that counts as a revocation. 0 is a minute.
	RevokeWithin time.Duration
	// SealUnreachableFor is how long after the last good health check values are still encrypted.
	// 0: only while health checks succeed.
	SealUnreachableFor time.Duration
	// MaxAge is how long values are encrypted with a seed until the next one is generated. 0 is 7
	// days. If the KMS does not answer, the old one stays in use.
	MaxAge time.Duration
	// MaxSeals is how many values are encrypted with a seed until the next one is generated, with
	// the same exception. Every value has a key of its own, so that the cipher sets no limit. 0 is
	// 2^32.
	MaxSeals uint64
	// Timeout limits one KMS call with all its retries. 0 is 20 seconds.
	Timeout time.Duration

	Observer Observer     // may be nil
	Logger   *slog.Logger // nil is slog.Default()
}

func (c *RingConfig) check() error {
	var errs []error
	if _, err := envelope.Marker(c.Provider); err != nil {
		errs = append(errs, err)
	}
	switch {
	case c.KMS == nil && c.Offline == nil:
		errs = append(errs, errors.New("KMS is missing"))
	case c.KMS != nil && c.Offline != nil:
		errs = append(errs, errors.New("an offline key has no KMS"))
	}
	c.ReadOnly = c.ReadOnly || c.Offline != nil
	if c.Cache == nil {
		errs = append(errs, errors.New("cache is missing"))
	}
	c.PollInterval = cmp.Or(c.PollInterval, time.Minute)
	c.FailingPollInterval = cmp.Or(c.FailingPollInterval, min(10*time.Second, c.PollInterval))
	c.RevokeWithin = cmp.Or(c.RevokeWithin, time.Minute)
	c.MaxAge = cmp.Or(c.MaxAge, 7*24*time.Hour)
	c.MaxSeals = cmp.Or(c.MaxSeals, 1<<32)
	c.Timeout = cmp.Or(c.Timeout, 20*time.Second)
	c.Logger = cmp.Or(c.Logger, slog.Default())
	if min(c.PollInterval, c.FailingPollInterval, c.RevokeWithin, c.MaxAge, c.Timeout) < 0 || c.SealUnreachableFor < 0 {
		errs = append(errs, errors.New("a duration is negative"))
	}
	if c.Observer == nil {
		c.Observer = silent{}
	}
	return errors.Join(errs...)
}

// Ring is the DEK seeds of one KMS provider. It is safe for concurrent use. No seed is generated
// before [Ring.Run]; until its first health check has ended, values to encrypt wait for it.
//
// It only ties its parts together. Each part names those that it uses in its struct.
type Ring struct {
	p         *provider   // what all parts share
	calls     *caller     // calls the KMS
	refusals  *refusals   // seeds that the KMS refuses to unwrap
	seeds     *seeds      // cached and unwrapped seeds
	copies    *copyReader // unwraps recovery copies
	copier    *copyWriter // has recovery copies wrapped
	generator *generator  // generates and verifies seeds
	monitor   *monitor    // health checks, rotation, revocation
}

// New makes a Ring. It starts nothing.
func New(c RingConfig) (*Ring, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("make key ring of provider %q: %w", c.Provider, err)
	}
	refused, err := lru.New[digest, *refusal](maxRefusals)
	if err != nil {
		return nil, fmt.Errorf("make key ring of provider %q: %w", c.Provider, err)
	}
	r := &Ring{p: &provider{
		cfg: c, suspected: rate.Sometimes{Interval: c.FailingPollInterval}, lostLogged: rate.Sometimes{Interval: time.Hour},
	}}
	r.p.copyName, _ = envelope.RecoveryAnnotation(c.Provider)
	r.p.readOnly.Store(c.ReadOnly)
	r.p.state.Store(&state{pending: make(chan struct{})})
	r.calls = &caller{p: r.p, denied: make(map[string]time.Time)}
	r.calls.base, r.calls.stop = context.WithCancelCause(context.Background())
	r.refusals = &refusals{p: r.p, calls: r.calls, lru: refused}
	r.seeds = &seeds{begun: time.Now(), ring: r, p: r.p, calls: r.calls, refusals: r.refusals}
	r.copies = &copyReader{ring: r, p: r.p, calls: r.calls, seeds: r.seeds}
	r.seeds.copies = r.copies
	r.copier = &copyWriter{p: r.p}
	r.copier.set.Store(new(copySet))
	r.generator = &generator{ring: r, p: r.p, calls: r.calls, seeds: r.seeds, copier: r.copier}
	r.monitor = &monitor{
		ring: r, p: r.p, calls: r.calls, refusals: r.refusals, seeds: r.seeds, generator: r.generator,
		probePauses: make(map[string]*probePause),
	}
	r.p.poller = kmsclient.NewPoller(r.monitor.check, r.monitor.pause)
	if r.IsOffline() {
		r.readOfflineID()
	}
	return r, nil
}

// Run keeps the ring alive until ctx ends: it checks the key's health, generates the first DEK seed
// and the next ones, and revokes. Once it has returned nothing of the ring runs any more, and what
// would need the KMS fails. It returns nil when ctx ends, and an error if the ring was run before.
func (r *Ring) Run(ctx context.Context) error {
	if !r.p.running.CompareAndSwap(false, true) {
		return fmt.Errorf("run key ring of provider %q: it was run before", r.p.cfg.Provider)
	}
	defer r.calls.close()
	if r.IsOffline() {
		<-ctx.Done()
		return nil
	}
	r.p.poller.Run(ctx)
	return nil
}

// WaitForCheck waits until the first health check has ended, and returns why the last one failed,
// or nil. Before, every encrypted value looks [Stale]. It needs [Ring.Run] to run. The error's text
// is safe to show.
func (r *Ring) WaitForCheck(ctx context.Context) error {
	for {
		st := r.p.state.Load()
		switch {
		case st.revoked != nil:
			return r.p.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
		case st.err != nil:
			return r.p.errorf(kindOf(st.err), st.err, "%s", describe(st.err))
		case st.healthy:
			return nil
		}
		select {
		case <-st.pending: // New has made the channel
		case <-ctx.Done():
			return r.p.errorf(Unavailable, context.Cause(ctx), "the KMS has not answered yet")
		}
	}
}

// Provider returns the ring's name in stored values.
func (r *Ring) Provider() string { return r.p.cfg.Provider }

// Check has the next health check made at once. It does not wait for it, and several calls within a
// second are one. Of an offline ring it reads the ID of the public keys again.
func (r *Ring) Check() {
	if r.IsOffline() {
		r.readOfflineID()
		return
	}
	r.p.poller.Wake()
}

// SetRecovery has the KMSs of rings wrap recovery copies of each seed that is generated from now
// on. If the setting has changed, the next health check generates a seed. If required, no value is
// encrypted with a seed that lacks one of these copies. Otherwise it is encrypted with the copies
// that there are, [Ring.Recovery] names the missing ones, and a new seed is generated once their
// provider wraps again. It may be called at any time. rings is not retained.
func (r *Ring) SetRecovery(rings []*Ring, required bool) error {
	for i, by := range rings {
		var err error
		switch {
		case by == r:
			err = errors.New("the provider cannot be its own recovery provider")
		case slices.Contains(rings[:i], by):
			err = fmt.Errorf("provider %q is named twice", by.Provider())
		case by.p.copyName == "":
			_, err = envelope.RecoveryAnnotation(by.Provider())
		}
		if err != nil {
			return fmt.Errorf("set recovery of provider %q: %w", r.Provider(), err)
		}
	}
	required = required && len(rings) > 0
	if now := r.copier.set.Load(); now.required == required && slices.Equal(now.rings, rings) {
		return nil
	}
	next := &copySet{rings: slices.Clone(rings), required: required}
	r.p.update(func(st *state) {
		r.copier.set.Store(next)
		// Values to encrypt wait for the health check that generates a seed with the copies, unless
		// the ring has ended.
		if st.writer != nil && st.writer.missing(next) != nil && st.pending == nil && !r.p.stopped {
			st.pending = make(chan struct{})
		}
	})
	r.p.poller.Wake()
	return nil
}

// ReadOnly reports whether the ring only decrypts.
func (r *Ring) ReadOnly() bool { return r.p.readOnly.Load() }

// StartWriting makes a ring that only decrypts generate seeds too. Values to encrypt wait for the
// health check that generates the first one. It does nothing to a ring of an offline key.
func (r *Ring) StartWriting() {
	if r.IsOffline() || !r.p.readOnly.Swap(false) {
		return
	}
	r.p.update(func(st *state) {
		if st.pending == nil && !r.p.stopped {
			st.pending = make(chan struct{})
		}
	})
	r.p.poller.Wake()
}

// Seal encrypts plaintext with the current seed, for etcdKey. If there is none yet, it waits for
// the first health check or, with mode.Try, returns [ErrWouldBlock]. It returns mode.Dst with the
// stored value, and retains neither argument.
func (r *Ring) Seal(ctx context.Context, etcdKey, plaintext []byte, mode Mode) ([]byte, *Error) {
	for waited := false; ; waited = true {
		st := r.p.state.Load()
		if st.revoked != nil {
			return nil, r.p.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
		}
		if r.maySeal(st) {
			if st.writer.seals.Add(1) == r.p.cfg.MaxSeals {
				r.p.poller.Wake()
			}
			sealed, err := st.writer.frame.Seal(mode.Dst, etcdKey, plaintext)
			if err != nil {
				return nil, r.p.errorf(Unavailable, err, "the value was not encrypted")
			}
			return sealed, nil
		}
		if waited || st.pending == nil {
			r.p.poller.Wake()
			return nil, r.cannotSeal(st)
		}
		if mode.Try {
			return nil, ErrWouldBlock
		}
		select {
		case <-st.pending:
		case <-ctx.Done():
			return nil, r.p.errorf(Unavailable, context.Cause(ctx), "the caller canceled while the first DEK seed was generated")
		}
	}
}

// Mode says how a value is encrypted or decrypted.
type Mode struct {
	Dst []byte // the result is appended to it; it must not overlap the value
	Try bool   // without a KMS call, or else the error is [ErrWouldBlock]
}

// Open decrypts an object of this provider that is stored under etcdKey, if need be with a recovery
// copy that one of rings unwraps. It returns mode.Dst with the plaintext, and the seed that was
// used.
func (r *Ring) Open(ctx context.Context, etcdKey, object []byte, mode Mode, rings []*Ring) ([]byte, UsedSeed, *Error) {
	plaintext, e, err := r.seeds.open(ctx, etcdKey, object, mode, rings)
	if err != nil && err != ErrWouldBlock {
		err = err.ofValue(etcdKey)
	}
	return plaintext, UsedSeed{e}, err
}

// OpenCached appends to dst the plaintext of an object of this provider, if it can be decrypted at
// once, with a seed that has decrypted others. Otherwise it returns nil, and [Ring.Open] finds out
// why. dst does not overlap the object.
func (r *Ring) OpenCached(dst, etcdKey, object []byte) []byte {
	return r.seeds.openHot(dst, etcdKey, object)
}

// UsedSeed is the seed that decrypted a value; the zero value is none.
type UsedSeed struct{ entry *entry }

// IsCurrent reports whether write would encrypt a value with the same KMS key and recovery copies,
// as far as it knows from the last Status.
func (u UsedSeed) IsCurrent(write *Ring) bool {
	e := u.entry
	return e != nil && e.ring == write && e.unwrapper == write && e.typ == envelope.TypeSeed && e.keyID == write.p.state.Load().keyID && write.copier.current(e.copies)
}

// maySeal reports whether values may be encrypted.
func (r *Ring) maySeal(st *state) bool {
	return st.revoked == nil && st.writer != nil && st.writer.missing(r.copier.set.Load()) == nil &&
		(st.healthy || st.works && kmsclient.ReasonOf(st.err) == kmsclient.Unhealthy || time.Since(st.lastGood) < r.p.cfg.SealUnreachableFor)
}

// cannotSeal returns why values may not be encrypted, for a state in which maySeal is false.
func (r *Ring) cannotSeal(st *state) *Error {
	switch {
	case r.p.readOnly.Load():
		return r.p.errorf(Refused, nil, "no rule writes with the provider")
	case st.revoked != nil:
		return r.p.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
	case st.err == nil && st.writer != nil:
		return r.p.errorf(Unavailable, nil, "no DEK seed with the required recovery copies has been generated yet")
	case st.err == nil:
		return r.p.errorf(Unavailable, nil, "no DEK seed has been generated yet")
	case st.writer != nil && st.writer.missing(r.copier.set.Load()) != nil:
		return r.p.errorf(kindOf(st.err), st.err, "the DEK seed in use lacks a required recovery copy: %s", describe(st.err))
	case st.writer != nil:
		return r.p.errorf(kindOf(st.err), st.err, "the last good health check of the KMS was %s ago, and values are encrypted for %s only: %s",
			time.Since(st.lastGood).Round(time.Second), r.p.cfg.SealUnreachableFor, describe(st.err))
	}
	return r.p.errorf(kindOf(st.err), st.err, "there is no DEK seed to encrypt with: %s", describe(st.err))
}

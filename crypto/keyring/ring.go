package keyring

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// RingConfig configures a Ring.
type RingConfig struct {
	// Provider names the ring in every stored value. Not empty, no colon.
	Provider string
	// KMS wraps and unwraps. If it is a [kmsclient.DataKeyGenerator] as well, it makes the seeds; otherwise the ring draws
	// them and has them wrapped by Encrypt.
	KMS kmsclient.Service
	// Cache holds the unwrapped seeds. Rings may share it.
	Cache *Cache
	// KeyOf returns what is the same for all key IDs whose KMS key can only be disabled as one: of all versions of a key. It may be asked about whatever
	// a stored value names. nil: each key ID stands for a key.
	KeyOf func(keyID string) string
	// ReadOnly rings open and never mint: for a provider that no rule writes with, whose key may allow Decrypt only.
	ReadOnly bool

	// PollInterval is the time between Status calls while contacts are good; a shorter RevokeWithin shortens it. 0 is a minute.
	PollInterval time.Duration
	// FailingPollInterval is the time between contacts while they are not good. 0 is 10 seconds, or PollInterval if that is shorter.
	FailingPollInterval time.Duration
	// RevokeWithin is how soon the seeds of a key that was disabled go out of use, and how long the KMS must have denied access before
	// that counts as revocation. 0 is a minute.
	RevokeWithin time.Duration
	// SealUnreachableFor is how long after the last good contact values are still sealed. 0: only while contacts are good.
	SealUnreachableFor time.Duration
	// MaxAge is how long a seed is sealed under before the next one is minted. 0 is 7 days. When the KMS does not answer, the old
	// one stays in use.
	MaxAge time.Duration
	// MaxSeals is how many values are sealed under a seed before the next one is minted, with the same exception. Every value has a
	// cipher key of its own, so this is hygiene and not a limit of the cipher. 0 is 2^32.
	MaxSeals uint64
	// Timeout bounds one KMS call with all its retries, where the KMS client does not do so earlier. 0 is 20 seconds.
	Timeout time.Duration

	Observer Observer     // may be nil
	Logger   *slog.Logger // nil is slog.Default()
}

func (c *RingConfig) check() error {
	var errs []error
	if _, err := envelope.Marker(c.Provider); err != nil {
		errs = append(errs, err)
	}
	if c.KMS == nil {
		errs = append(errs, errors.New("KMS is missing"))
	}
	if c.Cache == nil {
		errs = append(errs, errors.New("cache is missing"))
	}
	if c.PollInterval == 0 {
		c.PollInterval = time.Minute
	}
	if c.FailingPollInterval == 0 {
		c.FailingPollInterval = min(10*time.Second, c.PollInterval)
	}
	if c.RevokeWithin == 0 {
		c.RevokeWithin = time.Minute
	}
	if c.MaxAge == 0 {
		c.MaxAge = 7 * 24 * time.Hour
	}
	if c.MaxSeals == 0 {
		c.MaxSeals = 1 << 32
	}
	if c.Timeout == 0 {
		c.Timeout = 20 * time.Second
	}
	if min(c.PollInterval, c.FailingPollInterval, c.RevokeWithin, c.MaxAge, c.Timeout) < 0 || c.SealUnreachableFor < 0 {
		errs = append(errs, errors.New("a duration is negative"))
	}
	if c.Observer == nil {
		c.Observer = silent{}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return errors.Join(errs...)
}

// Ring is the seeds of one KMS provider. It is safe for concurrent use. Nothing is minted before [Ring.Run]; until its first contact with
// the KMS has ended, values to seal wait for it.
type Ring struct {
	cfg     RingConfig
	flights singleflight.Group
	hot     hotTable
	recent  envelope.Recent
	state   atomic.Pointer[state]

	recovery atomic.Pointer[recovery]
	copyName string // of the annotations with copies that this ring wraps; "" if its name does not do

	// poked wakes Run for a contact ahead of time.
	poked   chan struct{}
	doubted atomic.Int64 // when a stored value last caused a poke, in Unix nanoseconds
	running atomic.Bool

	// base is the context of unwraps, which no single caller owns; stop ends it, and calls are waited for.
	base  context.Context
	stop  context.CancelCauseFunc
	calls sync.WaitGroup

	mu      sync.Mutex
	stopped bool                 // no call may begin
	gen     uint64               // counts revocations; an unwrap that spans one is void
	denied  map[string]time.Time // since when the KMS denies to decrypt under a key, see keyOf
	rescues map[*Ring]*rescue    // by whose copies values were opened

	refusals   *lru.Cache[digest, *refusal]
	unwrapped  atomic.Int64 // when the KMS last unwrapped a seed, in Unix nanoseconds; 0 before
	flapped    atomic.Int64 // when Status last went back to a key ID that was left, in Unix seconds; 0 if it never did
	lostLogged atomic.Int64 // when the log said that values were handed on whose key is gone, in Unix seconds

	loop loop // Run's own
}

// state is what Seal and Open decide by. A published state does not change.
type state struct {
	writer   *writer       // nil: nothing to seal with
	keyID    string        // the last that Status said; "" before
	healthy  bool          // the last contact was good
	works    bool          // the key in use worked when it was last used; a KMS may say that it is not healthy and work
	lastGood time.Time     // the last good contact
	err      error         // why the last contact was not good; nil when it was, and before the first
	revoked  error         // not nil: the key may not be used, and this is the KMS' answer that says so
	pending  chan struct{} // not nil while a contact is under way, closed when it ends
}

// writer is the seed that values are sealed under.
type writer struct {
	frame    *envelope.Frame
	header   *envelope.Header  // for the KMS to unwrap it
	sum      [sha256.Size]byte // SHA-256 of the seed
	recovery *recovery         // that was to wrap copies
	copies   []copyID
	lacking  []lack
	keyID    string // as the KMS answered when it wrapped the seed: the one in the values
	statusID string // what Status said then
	minted   time.Time
	seals    atomic.Uint64
}

// maxDenied bounds what comes out of stored values in Ring.denied.
const maxDenied = 64

var errStopped = errors.New("key ring has stopped")

// New makes a Ring. It starts nothing.
func New(c RingConfig) (*Ring, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("make key ring of provider %q: %w", c.Provider, err)
	}
	r := &Ring{cfg: c, poked: make(chan struct{}, 1), denied: make(map[string]time.Time), rescues: make(map[*Ring]*rescue)}
	r.loop.unprobed, r.loop.settled.left = make(map[string]*probeBackOff), make(map[string]time.Time)
	var err error
	if r.refusals, err = lru.New[digest, *refusal](maxRefusals); err != nil {
		return nil, fmt.Errorf("make key ring of provider %q: %w", c.Provider, err)
	}
	r.recovery.Store(new(recovery))
	r.copyName, _ = envelope.RecoveryAnnotation(c.Provider)
	r.base, r.stop = context.WithCancelCause(context.Background())
	r.hot.init()
	r.state.Store(&state{pending: make(chan struct{})})
	return r, nil
}

// Contact waits until the first contact with the KMS has ended, and returns why the last one was not good, or nil. Before, everything that is sealed
// looks [Stale]. It needs [Ring.Run] to run. The error's text is safe to show.
func (r *Ring) Contact(ctx context.Context) error {
	for {
		st := r.state.Load()
		switch {
		case st.revoked != nil:
			return r.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
		case st.err != nil:
			return r.errorf(kindOf(st.err), st.err, "%s", describe(st.err))
		case st.healthy:
			return nil
		}
		select {
		case <-st.pending: // New has made it
		case <-ctx.Done():
			return r.errorf(Unavailable, context.Cause(ctx), "the KMS has not answered yet")
		}
	}
}

// Provider returns the ring's name in stored values.
func (r *Ring) Provider() string { return r.cfg.Provider }

// update publishes a changed copy of the state.
func (r *Ring) update(change func(*state)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := *r.state.Load()
	change(&next)
	r.state.Store(&next)
}

// Check has the key checked at once, and not only at the next poll: its state, and whether it has a
// new version. It does not wait for that, and several calls within a second are one.
func (r *Ring) Check() { r.poke() }

// poke asks Run for a contact ahead of time.
func (r *Ring) poke() {
	select {
	case r.poked <- struct{}{}:
	default:
	}
}

// seal seals plaintext under the current seed. With try it does not wait for that, and the error is [ErrWouldBlock] if it would have to.
func (r *Ring) seal(ctx context.Context, etcdKey, plaintext []byte, try bool) ([]byte, *Error) {
	for waited := false; ; waited = true {
		st := r.state.Load()
		if st.revoked != nil {
			return nil, r.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
		}
		if r.maySeal(st) {
			if st.writer.seals.Add(1) == r.cfg.MaxSeals {
				r.poke()
			}
			sealed, err := st.writer.frame.Seal(etcdKey, plaintext)
			if err != nil {
				return nil, r.errorf(Unavailable, err, "the value was not sealed")
			}
			return sealed, nil
		}
		if waited || st.pending == nil {
			r.poke()
			return nil, r.cannotSeal(st)
		}
		if try {
			return nil, errWouldBlock
		}
		select {
		case <-st.pending:
		case <-ctx.Done():
			return nil, r.errorf(Unavailable, context.Cause(ctx), "the caller went away while the first seed was minted")
		}
	}
}

func (r *Ring) maySeal(st *state) bool {
	return st.revoked == nil && st.writer != nil && st.writer.missing(r.recovery.Load()) == nil &&
		(st.healthy || st.works && kmsclient.ReasonOf(st.err) == kmsclient.Unhealthy || time.Since(st.lastGood) < r.cfg.SealUnreachableFor)
}

// cannotSeal says why there is nothing to seal with; only for a state in which maySeal is false.
func (r *Ring) cannotSeal(st *state) *Error {
	switch {
	case r.cfg.ReadOnly:
		return r.errorf(Refused, nil, "the provider is configured for reading only")
	case st.revoked != nil:
		return r.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
	case st.err == nil && st.writer != nil:
		return r.errorf(Unavailable, nil, "a seed with the required recovery copies is not minted yet")
	case st.err == nil:
		return r.errorf(Unavailable, nil, "the KMS has not been asked for a seed yet")
	case st.writer != nil && st.writer.missing(r.recovery.Load()) != nil:
		return r.errorf(kindOf(st.err), st.err, "the seed in use lacks a required recovery copy: %s", describe(st.err))
	case st.writer != nil:
		return r.errorf(kindOf(st.err), st.err, "the last good contact with the KMS was %s ago, and values are sealed for %s only: %s",
			time.Since(st.lastGood).Round(time.Second), r.cfg.SealUnreachableFor, describe(st.err))
	}
	return r.errorf(kindOf(st.err), st.err, "there is no seed to seal with: %s", describe(st.err))
}

// errorf makes an Error that names the provider and the key ID.
func (r *Ring) errorf(kind Kind, cause error, format string, args ...any) *Error {
	text := fmt.Sprintf("KMS provider %q", r.cfg.Provider)
	if id := r.state.Load().keyID; id != "" && kind != Corrupt {
		text += fmt.Sprintf(", key ID %q", id)
	}
	return &Error{Kind: kind, Text: text + ": " + fmt.Sprintf(format, args...), Err: cause}
}

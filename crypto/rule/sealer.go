// Package rule applies one rule of the configuration to values: it encrypts what is written under
// the rule's prefix and decrypts what is read. A [Sealer] knows which KMS provider encrypts, which
// ones decrypt, and what happens to other values: plaintext, values of other formats and providers,
// and values that cannot be decrypted.
//
// The DEK seeds are those of crypto/keyring. The package knows nothing of etcd's API, of the
// configuration or of metrics' names. docs/glossary.md explains the terms.
package rule

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// Config configures a Sealer.
type Config struct {
	// Prefix is the rule's prefix of etcd keys. It is for error texts and the Observer only.
	Prefix string
	// Write encrypts. If it is nil, the rule writes plaintext. Then a value that begins with the
	// marker of a provider in Read or of Legacy is [keyring.Refused], because reading it would try
	// to decrypt it.
	Write *keyring.Ring
	// Read are further providers whose values are decrypted.
	Read []*keyring.Ring
	// Legacy decrypt values of other formats, which are never written. If several have the marker
	// of a value, the first that decrypts it counts.
	Legacy []LegacyReader
	// Recovery are providers that only unwrap recovery copies, in addition to Write and Read.
	// [keyring.Ring.SetRecovery] says which providers wrap copies of Write's seeds.
	Recovery []*keyring.Ring
	// AllowPlaintextReads returns plaintext, and values of providers that the rule does not read,
	// as stored. Otherwise both are errors of kind [keyring.Plaintext].
	AllowPlaintextReads bool
	// Passthrough returns values as stored that are corrupt, or whose key is gone and that no
	// recovery copy decrypts. It never applies to an outage, to a key that an operator can enable
	// again, or to what a strict rule refuses.
	Passthrough bool
	// InspectOnly allows a Write that is for reading only, so that inspecting values generates no
	// seed. Seal is refused then.
	InspectOnly bool

	Observer Observer // may be nil
}

// Sealer is one rule: it encrypts the values that are written under it and decrypts those that are
// read. It is safe for concurrent use.
//
// It adds and removes one layer only: a value that itself begins with an encryption marker is
// encrypted like any other.
type Sealer struct {
	cfg     Config
	rings   []*keyring.Ring // Write first
	markers [][]byte
	legacy  [][]byte        // the markers of cfg.Legacy
	helpers []*keyring.Ring // that may unwrap recovery copies
}

// New makes a Sealer. It starts nothing.
func New(c Config) (*Sealer, error) {
	s := &Sealer{cfg: c}
	if s.cfg.Observer == nil {
		s.cfg.Observer = silent{}
	}
	if c.Write == nil && !c.AllowPlaintextReads {
		return nil, fmt.Errorf("make sealer of rule %q: it writes plaintext that it may not read", c.Prefix)
	}
	if c.Write != nil && c.Write.ReadOnly() && !c.InspectOnly {
		return nil, fmt.Errorf("make sealer of rule %q: provider %q is for reading only", c.Prefix, c.Write.Provider())
	}
	for _, r := range append([]*keyring.Ring{c.Write}, c.Read...) {
		if r == nil {
			continue
		}
		if r.IsOffline() {
			return nil, fmt.Errorf("make sealer of rule %q: provider %q wraps recovery copies only", c.Prefix, r.Provider())
		}
		if have := s.ring([]byte(r.Provider())); have == r {
			continue
		} else if have != nil {
			return nil, fmt.Errorf("make sealer of rule %q: two rings are of provider %q", c.Prefix, r.Provider())
		}
		marker, err := envelope.Marker(r.Provider())
		if err != nil {
			return nil, fmt.Errorf("make sealer of rule %q: %w", c.Prefix, err)
		}
		s.rings = append(s.rings, r)
		s.markers = append(s.markers, []byte(marker))
	}
	if err := s.addLegacy(); err != nil {
		return nil, err
	}
	for _, r := range slices.Concat(c.Recovery, s.rings) {
		if r != nil && !slices.Contains(s.helpers, r) {
			s.helpers = append(s.helpers, r)
		}
	}
	return s, nil
}

// ring returns the ring that the rule has for a provider, or nil.
func (s *Sealer) ring(provider []byte) *keyring.Ring {
	for _, r := range s.rings {
		if r.Provider() == string(provider) {
			return r
		}
	}
	return nil
}

// Seal returns what to store for value under key: value itself if the rule writes plaintext, new
// bytes otherwise. It retains neither argument. The error is a [*keyring.Error]. With a context
// that has ended it does what needs no KMS call, and does not count an error.
func (s *Sealer) Seal(ctx context.Context, key, value []byte) ([]byte, error) {
	out, err := s.SealTo(ctx, nil, key, value)
	if out == nil && err == nil {
		return value, nil
	}
	return out, err
}

// SealTo is Seal that appends to dst, which must not overlap value. It returns nil if the rule
// writes plaintext.
func (s *Sealer) SealTo(ctx context.Context, dst, key, value []byte) ([]byte, error) {
	return s.seal(ctx, key, value, keyring.Mode{Dst: dst})
}

// TrySeal is SealTo that does not wait: the error is [keyring.ErrWouldBlock] if the first seed is
// not there yet.
func (s *Sealer) TrySeal(dst, key, value []byte) ([]byte, error) {
	return s.seal(context.Background(), key, value, keyring.Mode{Dst: dst, Try: true})
}

func (s *Sealer) seal(ctx context.Context, key, value []byte, mode keyring.Mode) ([]byte, error) {
	if s.cfg.Write == nil {
		if owner := s.owner(value); owner != "" {
			return nil, s.failSeal(&keyring.Error{Kind: keyring.Refused, Text: fmt.Sprintf(
				"the value for etcd key %q begins like a value encrypted by %s, and would be read as such: the rule writes plaintext and reads that provider",
				keyring.Clip(key), owner)})
		}
		s.cfg.Observer.Sealed(s.cfg.Prefix, OutcomePlaintext)
		return nil, nil
	}
	sealed, err := s.cfg.Write.Seal(ctx, key, value, mode)
	switch {
	case err == keyring.ErrWouldBlock:
		return nil, err
	case err != nil && ctx.Err() != nil:
		return nil, err.InRule(s.cfg.Prefix)
	case err != nil:
		return nil, s.failSeal(err)
	}
	s.cfg.Observer.Sealed(s.cfg.Prefix, OutcomeOK)
	return sealed, nil
}

// owner names the provider whose marker value begins with, or returns "".
func (s *Sealer) owner(value []byte) string {
	for i, m := range s.markers {
		if bytes.HasPrefix(value, m) {
			return fmt.Sprintf("KMS provider %q", s.rings[i].Provider())
		}
	}
	for _, m := range s.legacy {
		if bytes.HasPrefix(value, m) {
			return fmt.Sprintf("the provider with the marker %q", m)
		}
	}
	return ""
}

func (s *Sealer) failSeal(err *keyring.Error) *keyring.Error {
	s.cfg.Observer.Sealed(s.cfg.Prefix, outcomeOf(err))
	return err.InRule(s.cfg.Prefix)
}

// Open appends to dst the value of stored, the bytes that etcd has under key, or stored itself if
// the rule returns it as stored. It retains no argument, and dst must not overlap stored. The error
// is a [*keyring.Error]. With a context that has ended it does what needs no KMS call, and does not
// count an error.
func (s *Sealer) Open(ctx context.Context, dst, key, stored []byte) ([]byte, error) {
	return s.openByRule(ctx, key, stored, keyring.Mode{Dst: dst})
}

// TryOpen is Open that does not wait: the error is [keyring.ErrWouldBlock] if the value needs a KMS
// call.
func (s *Sealer) TryOpen(dst, key, stored []byte) ([]byte, error) {
	for i, marker := range s.markers {
		if !bytes.HasPrefix(stored, marker) {
			continue
		}
		if out := s.rings[i].OpenCached(dst, key, stored[len(marker):]); out != nil {
			s.cfg.Observer.Opened(s.cfg.Prefix, OutcomeOK)
			return out, nil
		}
		break // openByRule finds out why
	}
	return s.openByRule(context.Background(), key, stored, keyring.Mode{Dst: dst, Try: true})
}

// openByRule is open with the rule's policies.
func (s *Sealer) openByRule(ctx context.Context, key, stored []byte, mode keyring.Mode) ([]byte, error) {
	plaintext, _, outcome, err := s.open(ctx, key, stored, mode)
	if err == keyring.ErrWouldBlock {
		return nil, err
	}
	if err != nil {
		if s.cfg.Passthrough && err.IsFinal() {
			err.NoteReturned()
			s.cfg.Observer.Opened(s.cfg.Prefix, OutcomePassthrough)
			return append(mode.Dst, stored...), nil
		}
		if ctx.Err() == nil {
			s.cfg.Observer.Opened(s.cfg.Prefix, outcomeOf(err))
		}
		return nil, err.InRule(s.cfg.Prefix)
	}
	if outcome != OutcomeOK && !s.cfg.AllowPlaintextReads {
		what := "is plaintext"
		if outcome == OutcomeForeign {
			what = "was encrypted by a provider that the rule does not read"
		}
		if ctx.Err() == nil {
			s.cfg.Observer.Opened(s.cfg.Prefix, OutcomeStrict)
		}
		err := &keyring.Error{Kind: keyring.Plaintext, Text: fmt.Sprintf("the stored value of etcd key %q %s, and the rule allows encrypted values only", keyring.Clip(key), what)}
		return nil, err.InRule(s.cfg.Prefix)
	}
	s.cfg.Observer.Opened(s.cfg.Prefix, outcome)
	if outcome != OutcomeOK {
		return append(mode.Dst, stored...), nil
	}
	return plaintext, nil
}

// open returns what stored is, without the rule's policies: OutcomeOK and mode.Dst with its
// plaintext, or OutcomePlaintext or OutcomeForeign and stored.
func (s *Sealer) open(ctx context.Context, key, stored []byte, mode keyring.Mode) ([]byte, keyring.UsedSeed, Outcome, *keyring.Error) {
	var none keyring.UsedSeed
	if !bytes.HasPrefix(stored, []byte(envelope.Root)) {
		return stored, none, OutcomePlaintext, nil
	}
	if provider, object, ok := envelope.Split(stored); ok {
		if r := s.ring(provider); r != nil {
			plaintext, used, err := r.Open(ctx, key, object, mode, s.helpers)
			return plaintext, used, OutcomeOK, err
		}
	}
	if plaintext, err, ok := s.openLegacy(key, stored); err != nil {
		return nil, none, "", err
	} else if ok {
		return append(mode.Dst, plaintext...), none, OutcomeOK, nil
	}
	// Under a rule that writes plaintext, a client may have written a part of a marker.
	if s.cfg.Write != nil && s.endsWithinMarker(stored) {
		return nil, none, "", &keyring.Error{Kind: keyring.Corrupt, Text: fmt.Sprintf("the stored value of etcd key %q is corrupt: it ends within the marker of an encrypted value", keyring.Clip(key))}
	}
	return stored, none, OutcomeForeign, nil
}

// Sealed reports whether stored begins like a value encrypted by a provider, or in a format, that
// the rule reads.
func (s *Sealer) Sealed(stored []byte) bool {
	begins := func(marker []byte) bool { return bytes.HasPrefix(stored, marker) }
	return slices.ContainsFunc(s.markers, begins) || slices.ContainsFunc(s.legacy, begins)
}

// Health returns nil if the rule can serve, by the last health checks: its writer can encrypt, and
// no provider that it reads is revoked or was never reached. The error's text is safe to show.
func (s *Sealer) Health() error {
	var why []string
	for _, r := range s.rings {
		st := r.State()
		switch {
		case r == s.cfg.Write && !st.CanSeal:
			why = append(why, st.SealReason)
		case st.Revoked, st.LastGood.IsZero():
			why = append(why, fmt.Sprintf("KMS provider %q: %s", st.Provider, st.Reason))
		}
	}
	if len(why) == 0 {
		return nil
	}
	return errors.New(strings.Join(why, "; "))
}

// Inspect decrypts stored without the rule's policies, leaves it as it is, and returns its state.
// It compares with the key ID from the last Status. The plaintext of a foreign or unencrypted value
// is stored itself. The error is not nil exactly for [keyring.Undecryptable]; it is a
// [*keyring.Error].
func (s *Sealer) Inspect(ctx context.Context, key, stored []byte) ([]byte, keyring.ValueState, error) {
	plaintext, used, outcome, err := s.open(ctx, key, stored, keyring.Mode{})
	switch {
	case err != nil:
		return nil, keyring.Undecryptable, err.InRule(s.cfg.Prefix)
	case outcome == OutcomeForeign:
		return plaintext, keyring.Foreign, nil
	case outcome == OutcomePlaintext && s.cfg.Write == nil:
		return plaintext, keyring.Current, nil
	case outcome == OutcomePlaintext:
		return plaintext, keyring.Unencrypted, nil
	case !used.IsCurrent(s.cfg.Write):
		return plaintext, keyring.Stale, nil
	}
	return plaintext, keyring.Current, nil
}

// Recheck starts a health check of a stored value's provider, does not wait for it, and returns the
// provider's state before: a LastGood after a refusal says that the KMS itself works. ok is false
// if the rule has no KMS provider for the value.
func (s *Sealer) Recheck(stored []byte) (st keyring.State, ok bool) {
	provider, _, ok := envelope.Split(stored)
	if !ok {
		return keyring.State{}, false
	}
	r := s.ring(provider)
	if r == nil {
		return keyring.State{}, false
	}
	r.Check()
	return r.State(), true
}

package envelope

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"sync"
)

// Sizes in bytes.
const (
	SeedSize  = 32 // of a seed that we make, and the least that a TypeSeed may have
	infoSize  = 32
	nonceSize = 12
	tagSize   = 16

	// Overhead is the size that encryption adds to a value, without the marker, the header and
	// protobuf's framing.
	Overhead = infoSize + nonceSize + tagSize
)

// ErrOpen is returned by [Seed.Open] for data that was not encrypted with this seed for this etcd
// key: it was tampered with, truncated, moved from another key, or encrypted with another seed. The
// cipher does not distinguish these causes.
var ErrOpen = errors.New("data does not decrypt under this seed and etcd key")

// Seed is an unwrapped DEK seed, ready for use. It is safe for concurrent use, and
// prints as [redacted].
//
// A seed cannot be erased: Go's runtime may have copied it, and the cipher objects made from it do
// not allow it. It remains in memory until the garbage collector reuses it. A dump of the process
// memory is outside the threat model.
type Seed struct {
	typ  Type
	aead cipher.AEAD // TypeKey only

	// prfs holds *prf, for TypeSeed. An HMAC object with its key's inner and outer state computed
	// beforehand makes a derivation three hash blocks; setting one up costs as much as
	// encrypting 1 KiB.
	prfs   sync.Pool
	secret []byte // TypeSeed only; what a new prf is made from
}

// prf is the one HMAC of HKDF-Expand for 32 bytes of output: T(1) = HMAC(seed, info | 0x01).
type prf struct {
	mac hash.Hash
	in  [infoSize + 1]byte
	out [sha256.Size]byte
}

// CheckSeedLength returns an error unless n bytes can be the secret of a seed: for TypeSeed at
// least 32 bytes, for TypeKey an AES key of 16, 24 or 32.
func CheckSeedLength(typ Type, n int) error {
	switch {
	case typ == TypeKey && n != 16 && n != 24 && n != 32:
		return fmt.Errorf("unwrapped key has %d bytes, not 16, 24 or 32", n)
	case typ == TypeSeed && n < SeedSize:
		return fmt.Errorf("unwrapped seed has %d bytes, less than %d", n, SeedSize)
	}
	return nil
}

// NewSeed makes a Seed from an unwrapped secret, see [CheckSeedLength]. It does not retain secret.
func NewSeed(typ Type, secret []byte) (*Seed, error) {
	if err := CheckSeedLength(typ, len(secret)); err != nil {
		return nil, err
	}
	switch typ {
	case TypeKey:
		aead, err := newAEAD(secret)
		if err != nil {
			return nil, err
		}
		return &Seed{typ: typ, aead: aead}, nil
	case TypeSeed:
		return &Seed{typ: typ, secret: append([]byte(nil), secret...)}, nil
	}
	return nil, malformed("source type %d is unknown", typ)
}

// newAEAD returns AES-GCM whose ciphertext begins with its random nonce, which is how the format
// lays it out.
func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return aead, nil
}

// derive returns the cipher of one value.
func (s *Seed) derive(info []byte) (cipher.AEAD, error) {
	p, _ := s.prfs.Get().(*prf)
	if p == nil {
		p = &prf{mac: hmac.New(sha256.New, s.secret)}
		p.in[infoSize] = 1
	}
	copy(p.in[:], info)
	p.mac.Reset()
	p.mac.Write(p.in[:])
	aead, err := newAEAD(p.mac.Sum(p.out[:0]))
	clear(p.out[:])
	s.prfs.Put(p)
	return aead, err
}

// seal encrypts plaintext for etcdKey and appends the result to dst: [Overhead] bytes more than
// plaintext. It does not allocate if dst has the capacity. The seed must be a TypeSeed.
func (s *Seed) seal(dst, etcdKey, plaintext []byte) ([]byte, error) {
	n := len(dst)
	dst = append(dst, make([]byte, infoSize)...)
	info := dst[n:]
	// Read does not fail: crypto/rand ends the process where the system has no randomness.
	_, _ = rand.Read(info)
	aead, err := s.derive(info)
	if err != nil {
		return nil, err
	}
	return aead.Seal(dst, nil, plaintext, etcdKey), nil //nolint:gosec // no nonce is passed: this AEAD draws its own
}

// Open appends the plaintext of data, an object's encrypted data, to dst. It retains no argument;
// dst must not overlap data. The error is [ErrOpen].
func (s *Seed) Open(dst, etcdKey, data []byte) ([]byte, error) {
	return s.OpenRecent(nil, 0, dst, etcdKey, data)
}

// OpenRecent is Open that caches the cipher in recent, which may be nil. now is the time in
// seconds, as [Recent.Expire] gets it.
func (s *Seed) OpenRecent(recent *Recent, now uint32, dst, etcdKey, data []byte) ([]byte, error) {
	aead, info, sealed := s.aead, []byte(nil), data
	kept := s.typ == TypeKey // its one cipher needs no keeping
	if s.typ == TypeSeed {
		if len(data) < Overhead {
			return nil, ErrOpen
		}
		info, sealed = data[:infoSize], data[infoSize:]
		if aead = recent.get(s, info, now); aead != nil {
			kept = true
		} else {
			var err error
			if aead, err = s.derive(info); err != nil {
				return nil, err
			}
		}
	}
	out, err := aead.Open(dst, nil, sealed, etcdKey)
	if err != nil {
		return nil, ErrOpen
	}
	if !kept {
		recent.put(s, info, aead, now)
	}
	return out, nil
}

const redacted = "[redacted]"

// String implements fmt.Stringer.
func (s *Seed) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (s *Seed) GoString() string { return redacted }

// Format implements fmt.Formatter, so that no verb reaches the fields.
func (s *Seed) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (s *Seed) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements encoding.TextMarshaler.
func (s *Seed) MarshalText() ([]byte, error) { return []byte(redacted), nil }

var (
	_ fmt.Stringer   = (*Seed)(nil)
	_ fmt.GoStringer = (*Seed)(nil)
	_ fmt.Formatter  = (*Seed)(nil)
	_ slog.LogValuer = (*Seed)(nil)
)

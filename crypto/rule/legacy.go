package rule

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// LegacyReader decrypts the values of a format that is read and never written, with keys that it
// has. It is safe for concurrent use.
type LegacyReader interface {
	// Marker returns what the values begin with: [envelope.Root] and a format that is not a KMS
	// provider's.
	Marker() string
	// Open returns the plaintext of stored as new bytes and leaves stored as it is. It retains
	// neither argument. known is false if the value is not damaged, but of a key that the reader
	// does not have; the error then says which. Its text may be shown to the client.
	Open(key, stored []byte) (plaintext []byte, known bool, err error)
}

// addLegacy checks the configured readers and adds their markers.
func (s *Sealer) addLegacy() error {
	for _, r := range s.cfg.Legacy {
		m := r.Marker()
		if !strings.HasPrefix(m, envelope.Root) || strings.HasPrefix(m, envelope.Root+"kms:") || !strings.HasSuffix(m, ":") {
			return fmt.Errorf("make sealer of rule %q: %q is not a marker of another format", s.cfg.Prefix, m)
		}
		s.legacy = append(s.legacy, []byte(m))
	}
	return nil
}

// openLegacy returns the plaintext of stored if it begins with the marker of one of the readers; ok
// is false if it does not. A missing key is the error only if every reader lacks it: otherwise the
// value is damaged.
func (s *Sealer) openLegacy(key, stored []byte) (plaintext []byte, err *keyring.Error, ok bool) {
	for i, r := range s.cfg.Legacy {
		if !bytes.HasPrefix(stored, s.legacy[i]) {
			continue
		}
		plaintext, known, why := r.Open(key, stored)
		switch {
		case why == nil:
			return plaintext, nil, true
		case known:
			err = &keyring.Error{Kind: keyring.Corrupt, Err: why, Text: fmt.Sprintf("the stored value of etcd key %q is corrupt: %v", keyring.Clip(key), why)}
		case err == nil:
			err = &keyring.Error{Kind: keyring.KeyUnusable, Err: why, Text: fmt.Sprintf("the stored value of etcd key %q cannot be decrypted: %v", keyring.Clip(key), why)}
		case err.Kind == keyring.KeyUnusable:
			err.Text += "; " + why.Error()
		}
	}
	return nil, err, err != nil
}

// endsWithinMarker reports whether stored is a part of a marker: what is left of a truncated
// encrypted value.
func (s *Sealer) endsWithinMarker(stored []byte) bool {
	begins := func(marker []byte) bool { return bytes.HasPrefix(marker, stored) }
	return slices.ContainsFunc(s.markers, begins) || slices.ContainsFunc(s.legacy, begins)
}

package inventory

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// SeedID identifies a wrapped DEK seed, and the annotations that go with it.
type SeedID [sha256.Size]byte

// SeedOf returns the seed of a value that is stored under a rule, and the value's marker, which
// names the provider; ok is false if it has no seed. For another rule the same seed is another one,
// since a recovery copy may give it to one of them alone.
func SeedOf(rule *Rule, stored []byte) (id SeedID, marker string, ok bool) {
	provider, object, ok := envelope.Split(stored)
	if !ok {
		return id, "", false
	}
	o, err := envelope.Parse(object)
	if err != nil {
		return id, "", false
	}
	h := sha256.New()
	write := func(b []byte) {
		_, _ = h.Write(binary.AppendUvarint(nil, uint64(len(b)))) // a hash takes everything
		_, _ = h.Write(b)
	}
	write([]byte(rule.Prefix))
	write(provider)
	write([]byte(o.KeyID))
	write(o.Source)
	// The KMS gets the annotations too: one that was altered must not speak for the values of a
	// good seed.
	for _, name := range slices.Sorted(maps.Keys(o.Annotations)) {
		write([]byte(name))
		write(o.Annotations[name])
	}
	h.Sum(id[:0])
	return id, string(stored[:len(stored)-len(object)]), true
}

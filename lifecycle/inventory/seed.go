package inventory

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// SeedID identifies a wrapped DEK seed together with its annotations.
type SeedID [sha256.Size]byte

// SeedOf returns the DEK seed of a value stored under a rule, and the marker of the value, which
// names the provider. ok is false if the value has no seed. The same seed has different IDs under
// different rules, because a recovery copy may be readable under only one of them.
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
	// The annotations are sent to the KMS as well. A failure with altered annotations must not
	// count for the other values of the seed.
	for _, name := range slices.Sorted(maps.Keys(o.Annotations)) {
		write([]byte(name))
		write(o.Annotations[name])
	}
	h.Sum(id[:0])
	return id, string(stored[:len(stored)-len(object)]), true
}

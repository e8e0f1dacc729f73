package etcdapi

import (
	"bytes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/prefix"
)

// This file has the policy for requests that change something: what clients may do to the proxies'
// own keys, and which methods a client that gets stored bytes (ciphertextClients) may call. Relayed
// and handled calls of every method apply it.

// access says whether a method only reads. The zero value is a method that a read-only client is
// refused.
type access int

const (
	writes access = iota // it changes something in etcd, or may
	reads                // it changes nothing
	// either: it depends on the request: its call refuses a read-only client one that changes
	// something
	either
)

// allows reports whether a client may call the method at all. With either the request decides.
func (m *Method) allows(id *listener.Identity) bool { return !id.ReadOnly() || m.access != writes }

// reach says what a request that changes keys would do to those of the proxies.
type reach int

const (
	reachesNone reach = iota // nothing
	// reachesOwn: it names some of them, by a key or by a range that begins or ends among them
	reachesOwn
	// reachesOver: its range begins and ends elsewhere, and holds all keys of at least one of their
	// prefixes
	reachesOver
)

// ownKeys are the keys that proxies keep in etcd for themselves, by their prefixes. No rule holds
// for them, and no client changes them. It is immutable.
type ownKeys struct{ prefixes *prefix.Set[struct{}] }

func newOwnKeys(prefixes []string) ownKeys {
	entries := make([]prefix.Entry[struct{}], 0, len(prefixes))
	for _, p := range prefixes {
		entries = append(entries, prefix.Entry[struct{}]{Prefix: p})
	}
	return ownKeys{prefix.New(entries)}
}

func (o ownKeys) empty() bool { return o.prefixes.Len() == 0 }

func (o ownKeys) has(key []byte) bool {
	_, ok := o.prefixes.Lookup(key)
	return ok
}

// reach is the one predicate of all requests that change keys. key and rangeEnd are as etcd has
// them: without a rangeEnd it is about one key.
func (o ownKeys) reach(key, rangeEnd []byte) reach {
	switch {
	case !o.prefixes.Overlaps(key, rangeEnd):
		return reachesNone
	case o.has(key):
		return reachesOwn
	}
	// The end itself is not in the range: one that is a prefix of theirs, whole, leaves its keys
	// out.
	for _, p := range o.prefixes.Roots() {
		if len(rangeEnd) > len(p) && bytes.HasPrefix(rangeEnd, []byte(p)) {
			return reachesOwn
		}
	}
	return reachesOver
}

// span is a range of keys, as etcd has it.
type span struct{ key, end []byte }

// without returns a range that reaches over own keys as ranges that hold all keys of it but those,
// in order.
func (o ownKeys) without(key, rangeEnd []byte) []span {
	var parts []span
	open := len(rangeEnd) == 1 && rangeEnd[0] == 0
	for _, root := range o.prefixes.Roots() {
		p := []byte(root)
		if bytes.Compare(p, key) < 0 {
			continue // and so are all its keys, since key is none of them
		}
		if !open && bytes.Compare(p, rangeEnd) >= 0 {
			break
		}
		if bytes.Compare(key, p) < 0 {
			parts = append(parts, span{key, p})
		}
		if key = after(p); key == nil {
			return parts
		}
	}
	if open || bytes.Compare(key, rangeEnd) < 0 {
		parts = append(parts, span{key, rangeEnd})
	}
	return parts
}

// after returns the first key after all that begin with p; nil if there is none.
func after(p []byte) []byte {
	for i := len(p) - 1; i >= 0; i-- {
		if p[i] < 0xff {
			end := bytes.Clone(p[:i+1])
			end[i]++
			return end
		}
	}
	return nil
}

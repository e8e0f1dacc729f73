package keyring

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// CacheConfig configures a Cache.
type CacheConfig struct {
	// Seeds limits how many unwrapped seeds are kept, of all rings together. 0 is 10,000. About 1
	// KiB each.
	Seeds int
	// TTL is how long an unwrapped seed is used before the KMS has to unwrap it again. 0 is 24
	// hours.
	TTL time.Duration
	// ServeUnreachableFor is how long after its TTL a seed still decrypts while the KMS does not
	// answer. 0 is not at all. So a seed whose key was revoked while the KMS is unreachable is used
	// for TTL + ServeUnreachableFor at most.
	ServeUnreachableFor time.Duration
}

// Cache holds the unwrapped DEK seeds of any number of rings. It evicts the least recently used
// ones. It is safe for concurrent use and needs no Close.
type Cache struct {
	ttl   time.Duration
	stale time.Duration
	lru   *lru.Cache[digest, *entry]
}

// NewCache makes an empty Cache.
func NewCache(c CacheConfig) (*Cache, error) {
	if c.Seeds < 0 || c.TTL < 0 || c.ServeUnreachableFor < 0 {
		return nil, errors.New("make seed cache: a size or a duration is negative")
	}
	l, err := lru.New[digest, *entry](cmp.Or(c.Seeds, 10000))
	if err != nil {
		return nil, fmt.Errorf("make seed cache: %w", err)
	}
	return &Cache{ttl: cmp.Or(c.TTL, 24*time.Hour), stale: c.ServeUnreachableFor, lru: l}, nil
}

// Len returns how many seeds the cache holds.
func (c *Cache) Len() int { return c.lru.Len() }

// digest identifies a wrapped seed: SHA-256 of type, provider, wrapped seed, key ID and
// annotations.
type digest [sha256.Size]byte

func digestOf(provider string, h *envelope.Header) digest {
	d := sha256.New()
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(h.Type)) //nolint:gosec // a validated type is 0 or 1
	d.Write(b[:])
	writeField(d, provider)
	writeField(d, h.Source)
	writeField(d, h.KeyID)
	for _, k := range slices.Sorted(maps.Keys(h.Annotations)) {
		writeField(d, k)
		writeField(d, h.Annotations[k])
	}
	var sum digest
	d.Sum(sum[:0])
	return sum
}

// writeField writes the length before the bytes, so that no two lists of fields read the same.
func writeField[T string | []byte](d hash.Hash, v T) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(v)))
	d.Write(n[:])
	d.Write([]byte(v))
}

// entry is one unwrapped seed. Fields without atomics do not change. Those that every value needs
// come first.
type entry struct {
	seed      *envelope.Seed
	fetched   time.Time
	unwrapper *Ring    // whose KMS unwrapped it: ring, or that of a recovery copy
	copyUse   *copyUse // nil unless a recovery copy was unwrapped
	// touched is when the entry was last moved up in the LRU, in seconds after it was fetched. The
	// fast path does that at most once a second.
	touched atomic.Int64
	// verified is set once the seed has decrypted a value, or was generated here. Until then a
	// value that does not decrypt may be the fault of what the KMS answered.
	verified atomic.Bool
	// evicted is set when the entry was evicted; the rings' fast paths may still hold it.
	evicted atomic.Bool

	ring           *Ring // of the values' provider
	digest         digest
	typ            envelope.Type
	keyID          string
	copies         []copyID // that the values hold
	unwrapperKeyID string
	sum            [sha256.Size]byte // SHA-256 of the secret as the KMS unwrapped it
	// header is for unwrapper to unwrap it again; nil when that would take too much memory.
	header     *envelope.Header
	copyReason string // why a recovery copy was unwrapped
	// recheck is what the KMS returned when an unverified seed was unwrapped again; nil before.
	recheck atomic.Pointer[recheck]
	// retry is when the KMS is called again for a seed past its TTL or from a recovery copy, in
	// Unix nanoseconds.
	retry atomic.Int64
}

// age is what may be done with an entry at a time.
type age int

const (
	fresh   age = iota // use it
	stale              // unwrap it again; use it if the KMS does not answer
	expired            // unwrap it again
)

func (c *Cache) ageOf(e *entry, now time.Time) age { return c.ageAfter(e, now.Sub(e.fetched)) }

// ageAfter is ageOf for an entry that was fetched so long ago.
func (c *Cache) ageAfter(e *entry, old time.Duration) age {
	switch {
	case e.evicted.Load():
		return expired
	case old < c.ttl:
		return fresh
	case old < c.ttl+c.stale:
		return stale
	}
	return expired
}

func (c *Cache) get(d digest) *entry {
	e, ok := c.lru.Get(d)
	if !ok || e.evicted.Load() {
		return nil
	}
	return e
}

// touch keeps an entry, fetched so long ago, that only the fast path uses from looking unused.
func (c *Cache) touch(e *entry, old time.Duration) {
	s := int64(old / time.Second)
	if last := e.touched.Load(); last != s && e.touched.CompareAndSwap(last, s) {
		c.lru.Get(e.digest)
	}
}

func (c *Cache) put(e *entry) { c.lru.Add(e.digest, e) }

func (c *Cache) evict(e *entry) {
	e.evicted.Store(true)
	if now, ok := c.lru.Peek(e.digest); ok && now == e {
		c.lru.Remove(e.digest)
	}
}

// evictAll evicts every entry that match accepts, and returns their number.
func (c *Cache) evictAll(match func(*entry) bool) int {
	n := 0
	var rings []*Ring
	for _, e := range c.lru.Values() {
		if match(e) {
			c.evict(e)
			n++
			if !slices.Contains(rings, e.ring) {
				rings = append(rings, e.ring)
			}
		}
	}
	for _, r := range rings {
		r.seeds.recent.Clear() // ciphers made from the seeds
	}
	return n
}

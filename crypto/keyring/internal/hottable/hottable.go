// Package hottable finds what belongs to a few long byte strings without a lock.
package hottable

import (
	"bytes"
	"encoding/binary"
	"sync/atomic"
)

// Table is a lossy map of up to 64 keys. Its slots are overwritten without order. It is safe for
// concurrent use, and the zero value is ready.
type Table[T any] struct {
	slots [64]atomic.Pointer[slot[T]]
}

type slot[T any] struct {
	key   []byte
	value *T
}

// slot selects a slot by a few bytes out of the middle and from the end of a key. In the header of
// a stored value, the wrapped seed takes most of the key, and ends it unless there are annotations.
func (t *Table[T]) slot(key []byte) *atomic.Pointer[slot[T]] {
	h := uint64(len(key))
	if n := len(key); n >= 24 {
		h += binary.LittleEndian.Uint64(key[n-16:]) ^ binary.LittleEndian.Uint64(key[n/2:])
	}
	const odd = 0x9e3779b97f4a7c15 // its product with h depends on all bits of h
	return &t.slots[h*odd>>58]
}

// Get returns the value of a key, or nil. It does not retain key.
func (t *Table[T]) Get(key []byte) *T {
	if s := t.slot(key).Load(); s != nil && bytes.Equal(s.key, key) {
		return s.value
	}
	return nil
}

// Put keeps value for a key, which it copies.
func (t *Table[T]) Put(key []byte, value *T) {
	t.slot(key).Store(&slot[T]{bytes.Clone(key), value})
}

// Remove removes the values for which match is true.
func (t *Table[T]) Remove(match func(*T) bool) {
	for i := range t.slots {
		if s := t.slots[i].Load(); s != nil && match(s.value) {
			t.slots[i].CompareAndSwap(s, nil)
		}
	}
}

// Package prefix finds what holds for an etcd key among prefixes, of which the longest wins.
package prefix

import (
	"bytes"
	"slices"
)

// Set maps prefixes to values. It is immutable and safe for concurrent use; the zero value is
// empty.
type Set[T any] struct {
	entries []entry[T]
}

type entry[T any] struct {
	prefix []byte
	value  T
	parent int // the longest other prefix that begins this one, -1 for none
}

// Entry is a prefix and what holds for the keys that begin with it.
type Entry[T any] struct {
	Prefix string // "" is every key
	Value  T
}

// New makes a Set. Of two entries with one prefix the later one counts; callers that mind check
// before.
func New[T any](entries []Entry[T]) *Set[T] {
	s := &Set[T]{}
	for _, e := range entries {
		i, found := s.search([]byte(e.Prefix))
		if !found {
			s.entries = slices.Insert(s.entries, i, entry[T]{})
		}
		s.entries[i] = entry[T]{prefix: []byte(e.Prefix), value: e.Value}
	}
	for i := range s.entries {
		// The nearest prefix before this one either begins it or leads to the one that does.
		parent := i - 1
		for parent >= 0 && !bytes.HasPrefix(s.entries[i].prefix, s.entries[parent].prefix) {
			parent = s.entries[parent].parent
		}
		s.entries[i].parent = parent
	}
	return s
}

// Len returns how many prefixes there are.
func (s *Set[T]) Len() int { return len(s.entries) }

// search returns where key stands, or would stand, among the prefixes.
func (s *Set[T]) search(key []byte) (int, bool) {
	from, to := 0, len(s.entries)
	for from < to {
		middle := int(uint(from+to) / 2)
		switch c := bytes.Compare(s.entries[middle].prefix, key); {
		case c == 0:
			return middle, true
		case c < 0:
			from = middle + 1
		default:
			to = middle
		}
	}
	return from, false
}

// Lookup returns the value of the longest prefix of key. It takes O(log n) and allocates nothing.
func (s *Set[T]) Lookup(key []byte) (value T, ok bool) {
	// Every prefix of key sorts at or before key, and whatever sorts between one of them and key
	// begins with it. So the last prefix at or before key is the match, or its chain of parents
	// leads there.
	i, found := s.search(key)
	if !found {
		i--
	}
	for i >= 0 {
		if bytes.HasPrefix(key, s.entries[i].prefix) {
			return s.entries[i].value, true
		}
		i = s.entries[i].parent
	}
	return value, false
}

// Overlaps reports whether a range of keys, in etcd's form, can hold a key with one of the
// prefixes: rangeEnd is empty for the single key, and "\x00" for all keys from key on. A range
// whose end is not after its start holds no key.
func (s *Set[T]) Overlaps(key, rangeEnd []byte) bool {
	if len(s.entries) == 0 {
		return false
	}
	_, covered := s.Lookup(key)
	if len(rangeEnd) == 0 {
		return covered
	}
	open := len(rangeEnd) == 1 && rangeEnd[0] == 0
	if !open && bytes.Compare(key, rangeEnd) >= 0 {
		return false
	}
	if covered {
		return true
	}
	// No prefix covers key itself, so one overlaps only if it begins inside the range.
	i, _ := s.search(key)
	return i < len(s.entries) && (open || bytes.Compare(s.entries[i].prefix, rangeEnd) < 0)
}

// Roots returns the prefixes that no other one begins: together they cover the same keys as all,
// each once. Sorted.
func (s *Set[T]) Roots() []string {
	var roots []string
	for _, e := range s.entries {
		if e.parent < 0 {
			roots = append(roots, string(e.prefix))
		}
	}
	return roots
}

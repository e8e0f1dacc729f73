// Package slab allocates values of one type several at a time, for values that are needed for every
// call and cannot be reused safely because others may still refer to them. It is for values that
// hold no message: a value in use keeps those that were allocated with it in memory.
package slab

// maxSize is how many values are allocated at a time at most. A value that is in use keeps those
// that were allocated with it in memory.
const maxSize = 8

// Slab allocates values. The first allocations are small, so that a connection with one long call
// needs no more than that. The zero value is ready; a Slab is not safe for concurrent use.
type Slab[T any] struct {
	free []T
	size int
}

// New returns a pointer to a zero value.
func (s *Slab[T]) New() *T {
	if len(s.free) == 0 {
		s.size = min(max(2*s.size, 1), maxSize)
		s.free = make([]T, s.size)
	}
	v := &s.free[0]
	s.free = s.free[1:]
	return v
}

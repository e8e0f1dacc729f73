package rpc

import (
	"math/bits"
	"sync"

	"google.golang.org/grpc/mem"
)

// Sizes of pooled buffers, as powers of two.
const (
	minBufferBits = 11 // 2 KiB: grpc gives nothing back that holds 1 KiB or less
	maxBufferBits = 26 // 64 MiB: larger ones are too rare

	minPooled = 256 // bytes: less is not worth it
)

// IOBufferSize is how many bytes are read from or written to a connection at once: a long list in a
// quarter of the system calls that grpc's default needs.
const IOBufferSize = 128 << 10

// Pool lends the buffers that messages pass through, on both sides. It clears a buffer when it is
// given back: values must not lie about in memory that waits for its next use. grpc's own pool
// clears the whole of a buffer, used or not, but only when it lends it.
type Pool struct {
	tiers [maxBufferBits - minBufferBits + 1]sync.Pool
}

var _ mem.BufferPool = (*Pool)(nil)

// Buffers is the process' pool. sync.Pool gives unused buffers back to the runtime.
var Buffers = new(Pool)

// Get implements mem.BufferPool. What the buffer holds is zero.
func (p *Pool) Get(length int) *[]byte {
	tier := max(bits.Len(uint(max(length, 1)-1)), minBufferBits)
	if length < minPooled || tier > maxBufferBits {
		b := make([]byte, length)
		return &b
	}
	if b, ok := p.tiers[tier-minBufferBits].Get().(*[]byte); ok {
		*b = (*b)[:length]
		return b
	}
	b := make([]byte, length, 1<<tier)
	return &b
}

// Put implements mem.BufferPool. The caller has written at most to the length that b has.
func (p *Pool) Put(b *[]byte) {
	clear(*b)
	tier := bits.Len(uint(cap(*b))) - 1
	if tier < minBufferBits || tier > maxBufferBits || cap(*b) != 1<<tier {
		return // not of this pool
	}
	p.tiers[tier-minBufferBits].Put(b)
}

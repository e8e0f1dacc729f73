package keyring

import (
	"bytes"
	"hash/maphash"
	"sync/atomic"
)

// hotTable finds the seeds of recent values without a lock and without decoding: by the bytes after
// a value's data, which all values of one seed share. Its few slots are overwritten without order;
// what is not found here is looked up in the [Cache].
type hotTable struct {
	seed  maphash.Seed
	slots [64]atomic.Pointer[hotSlot]
}

type hotSlot struct {
	rest  []byte // of an object after its data, which envelope.Parse has accepted
	entry *entry
}

func (t *hotTable) slot(rest []byte) *atomic.Pointer[hotSlot] {
	return &t.slots[maphash.Bytes(t.seed, rest)%uint64(len(t.slots))]
}

func (t *hotTable) get(rest []byte) *entry {
	if s := t.slot(rest).Load(); s != nil && bytes.Equal(s.rest, rest) {
		return s.entry
	}
	return nil
}

func (t *hotTable) put(rest []byte, e *entry) {
	t.slot(rest).Store(&hotSlot{rest: bytes.Clone(rest), entry: e})
}

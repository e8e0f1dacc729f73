package envelope

import (
	"bytes"
	"crypto/cipher"
	"sync/atomic"
)

// Recent keeps the ciphers of some values that were opened lately: one event goes to many watchers, and deriving its cipher costs more than
// opening 1 KiB with it. It holds at most 64 ciphers, 100 KiB, and the seeds they came from. It is safe for concurrent use, and the zero
// value is ready.
type Recent struct {
	slots [64]atomic.Pointer[derived]
}

type derived struct {
	seed *Seed
	info [infoSize]byte
	aead cipher.AEAD
}

// slot returns where the cipher of info would be. info is random, so any byte of it will do.
func (r *Recent) slot(info []byte) *atomic.Pointer[derived] {
	return &r.slots[int(info[0])%len(r.slots)]
}

// get returns nil if r is nil or does not have the cipher.
func (r *Recent) get(seed *Seed, info []byte) cipher.AEAD {
	if r == nil {
		return nil
	}
	if d := r.slot(info).Load(); d != nil && d.seed == seed && bytes.Equal(d.info[:], info) {
		return d.aead
	}
	return nil
}

func (r *Recent) put(seed *Seed, info []byte, aead cipher.AEAD) {
	if r != nil {
		r.slot(info).Store(&derived{seed: seed, info: [infoSize]byte(info), aead: aead})
	}
}

// Clear drops every cipher.
func (r *Recent) Clear() {
	for i := range r.slots {
		r.slots[i].Store(nil)
	}
}

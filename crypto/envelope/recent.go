package envelope

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"sync/atomic"
)

// Recent keeps the ciphers of some values that were opened more than once lately: one event goes to many watchers, and deriving its cipher costs
// more than opening 1 KiB with it. What is opened once, as in a list, leaves only a mark. It holds at most 64 ciphers, 100 KiB, and the seeds
// they came from. It is safe for concurrent use, and the zero value is ready.
type Recent struct {
	slots [64]recentSlot
}

type recentSlot struct {
	mark   atomic.Uint64 // of the info seen last
	cipher atomic.Pointer[derived]
}

type derived struct {
	seed *Seed
	info [infoSize]byte
	aead cipher.AEAD
}

// slot returns where the cipher of info would be. info is random, so any of its bytes will do.
func (r *Recent) slot(info []byte) *recentSlot {
	return &r.slots[int(info[0])%len(r.slots)]
}

// get returns nil if r is nil or does not have the cipher.
func (r *Recent) get(seed *Seed, info []byte) cipher.AEAD {
	if r == nil {
		return nil
	}
	if d := r.slot(info).cipher.Load(); d != nil && d.seed == seed && bytes.Equal(d.info[:], info) {
		return d.aead
	}
	return nil
}

// put keeps a cipher whose info was also the last to come to its slot.
func (r *Recent) put(seed *Seed, info []byte, aead cipher.AEAD) {
	if r == nil {
		return
	}
	s, mark := r.slot(info), binary.LittleEndian.Uint64(info)
	if s.mark.Load() != mark {
		s.mark.Store(mark)
		return
	}
	s.cipher.Store(&derived{seed: seed, info: [infoSize]byte(info), aead: aead})
}

// Clear drops every cipher.
func (r *Recent) Clear() {
	for i := range r.slots {
		r.slots[i].cipher.Store(nil)
	}
}

package envelope

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"sync/atomic"
)

// Recent caches the ciphers of values that were decrypted more than once recently: one event goes
// to many watchers, and lists are read repeatedly. Deriving a cipher costs more than decrypting 1
// KiB with it. A value that is decrypted once leaves only a mark. Recent holds at most 16,384
// ciphers, 25 MiB, and their seeds. It is safe for concurrent use, and the zero value is ready.
type Recent struct {
	table atomic.Pointer[recentTable] // nil until it is needed
}

// Sizes of the table, as powers of two.
const (
	setBits  = 12 // sets of four ciphers
	markBits = 15 // pairs of marks
)

type recentTable struct {
	marks [1 << markBits][2]atomic.Uint32 // of the infos seen last, the last one first
	sets  [1 << setBits]recentSet
}

// recentSet has the size of a line of the processor's cache. Most lookups miss that cache, so their
// cost is the number of lines. A tag is a part of the info of the cipher with the same index.
type recentSet struct {
	tags    [4]atomic.Uint32
	ciphers [4]atomic.Pointer[derived]
	_       [16]byte
}

type derived struct {
	seed *Seed
	info [infoSize]byte
	aead cipher.AEAD
}

// recentPlace is where a cipher may be: in one of two sets. info is random, so any of its bytes can
// select them.
type recentPlace struct {
	tag   uint32
	sets  [2]*recentSet
	marks *[2]atomic.Uint32
}

func (t *recentTable) place(info []byte) recentPlace {
	at := func(i int) int { return int(binary.LittleEndian.Uint16(info[i:])) }
	return recentPlace{
		tag:   binary.LittleEndian.Uint32(info[6:]),
		sets:  [2]*recentSet{&t.sets[at(0)%len(t.sets)], &t.sets[at(2)%len(t.sets)]},
		marks: &t.marks[at(4)%len(t.marks)],
	}
}

// get returns nil if r is nil or does not have the cipher.
func (r *Recent) get(seed *Seed, info []byte) cipher.AEAD {
	if r == nil {
		return nil
	}
	t := r.table.Load()
	if t == nil {
		return nil
	}
	p := t.place(info)
	for _, s := range p.sets {
		for i := range s.tags {
			if s.tags[i].Load() != p.tag {
				continue
			}
			if d := s.ciphers[i].Load(); d != nil && d.seed == seed && bytes.Equal(d.info[:], info) {
				return d.aead
			}
		}
	}
	return nil
}

// put keeps a cipher whose info has left its mark before.
func (r *Recent) put(seed *Seed, info []byte, aead cipher.AEAD) {
	if r == nil {
		return
	}
	t := r.table.Load()
	if t == nil {
		r.table.CompareAndSwap(nil, new(recentTable))
		if t = r.table.Load(); t == nil { // cleared meanwhile
			return
		}
	}
	p := t.place(info)
	if p.marks[0].Load() != p.tag && p.marks[1].Load() != p.tag {
		p.marks[1].Store(p.marks[0].Load())
		p.marks[0].Store(p.tag)
		return
	}
	to, way := p.sets[0], int(info[10])%len(p.sets[0].tags) // where no place is free
	least := len(to.tags)
	for _, s := range p.sets {
		used, free := 0, 0
		for i := range s.ciphers {
			if s.ciphers[i].Load() != nil {
				used++
			} else {
				free = i
			}
		}
		if used < least {
			to, way, least = s, free, used
		}
	}
	to.ciphers[way].Store(&derived{seed: seed, info: [infoSize]byte(info), aead: aead})
	to.tags[way].Store(p.tag)
}

// Clear removes all ciphers.
func (r *Recent) Clear() { r.table.Store(nil) }

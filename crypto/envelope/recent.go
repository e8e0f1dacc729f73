package envelope

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"sync/atomic"
)

// Recent caches the ciphers of values that were decrypted more than once recently: one event goes
// to many watchers, and lists are read repeatedly. Deriving a cipher costs more than decrypting 1
// KiB with it. A value that is decrypted once leaves only a mark. Recent holds at most 10,240
// ciphers, which take [RecentBytes], and their seeds. It drops those that nobody has used for some
// seconds as it takes others, and [Recent.Expire] drops the rest. It is safe for concurrent use,
// and the zero value is ready.
type Recent struct {
	table atomic.Pointer[recentTable] // nil until it is needed
}

// RecentBytes is the memory of all ciphers that a [Recent] holds at most, 8 MiB. Its table takes
// 384 KiB in addition.
const RecentBytes = ways << setBits * cipherBytes

// Sizes of the table: sets and pairs of marks, as powers of two, and ciphers in a set.
const (
	setBits  = 11
	markBits = 15
	ways     = 5
)

// idleFor is how many seconds a cipher that nobody uses is kept at least while others come. Most
// values that are read a few times were replaced by others when their ciphers were used last.
const idleFor = 10

// A cipher that was used in the last youngFor seconds is replaced by one in youngTurns attempts
// only. The values of a list that is longer than there is room would replace each other otherwise,
// and few would be cached when they are needed. A value that is read often, such as an event with
// many watchers, takes its place soon.
const (
	youngFor   = 5
	youngTurns = 8
)

// cipherBytes is the memory of one cipher: that of AES-GCM in the standard library, and a
// [derived].
const cipherBytes = 768 + 64

// recentTable begins with the sets, so that each has one line of the processor's cache: the memory
// of something that is so large begins with a page.
type recentTable struct {
	sets  [1 << setBits]recentSet
	marks [1 << markBits][2]atomic.Uint32 // of the infos seen last, the last one first
	turns atomic.Uint32                   // attempts to replace young ciphers
	hand  atomic.Uint32                   // the set that is searched next for idle ciphers
}

// recentSet has the size of a line of the processor's cache. Most lookups miss that cache, so their
// cost is the number of lines. A tag is a part of the info of the cipher with the same index.
type recentSet struct {
	tags    [ways]atomic.Uint32
	ciphers [ways]atomic.Pointer[derived]
}

type derived struct {
	seed *Seed
	info [infoSize]byte
	aead cipher.AEAD
	used atomic.Uint32 // the second of its last use
}

// age is how many seconds before now the cipher was last used. It may be negative: another
// goroutine may have a later time.
func (d *derived) age(now uint32) int32 {
	return int32(now - d.used.Load()) //nolint:gosec // a process does not run for 68 years
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

// get returns nil if r is nil or does not have the cipher. now is the time in seconds.
func (r *Recent) get(seed *Seed, info []byte, now uint32) cipher.AEAD {
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
				if d.used.Load() != now {
					d.used.Store(now)
				}
				return d.aead
			}
		}
	}
	return nil
}

// put keeps a cipher whose info has left its mark before.
func (r *Recent) put(seed *Seed, info []byte, aead cipher.AEAD, now uint32) {
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
	t.sweep(now)
	to, way := t.slotFor(&p, int(info[10]), now)
	if to == nil {
		return
	}
	d := &derived{seed: seed, info: [infoSize]byte(info), aead: aead}
	d.used.Store(now)
	to.ciphers[way].Store(d)
	to.tags[way].Store(p.tag)
}

// sweep drops the idle ciphers of one set, in turns.
func (t *recentTable) sweep(now uint32) {
	s := &t.sets[t.hand.Add(1)%uint32(len(t.sets))]
	for i := range s.ciphers {
		if d := s.ciphers[i].Load(); d != nil && d.age(now) > idleFor {
			s.ciphers[i].CompareAndSwap(d, nil)
		}
	}
}

// slotFor returns where a cipher goes: to a free place in the set that has more of them or, if
// there is none, to that of the cipher that was not used for the longest time. It returns nil if
// that was used lately, but for some attempts. first varies the choice between equals.
func (t *recentTable) slotFor(p *recentPlace, first int, now uint32) (to *recentSet, way int) {
	var old *recentSet
	oldWay, oldest := 0, int32(0)
	most := 0
	for _, s := range p.sets {
		free, last := 0, 0
		for n := range s.ciphers {
			i := (first + n) % len(s.ciphers)
			d := s.ciphers[i].Load()
			if d == nil {
				free, last = free+1, i
			} else if age := d.age(now); old == nil || age > oldest {
				old, oldWay, oldest = s, i, age
			}
		}
		if free > most {
			to, way, most = s, last, free
		}
	}
	switch {
	case to != nil:
		return to, way
	case oldest >= youngFor, t.turns.Add(1)%youngTurns == 0:
		return old, oldWay
	}
	return nil, 0
}

// Clear removes all ciphers.
func (r *Recent) Clear() { r.table.Store(nil) }

// Expire removes the ciphers that were last used before a time in seconds, and all memory if none
// is left. It returns how many are left.
func (r *Recent) Expire(before uint32) (left int) {
	t := r.table.Load()
	if t == nil {
		return 0
	}
	for i := range t.sets {
		s := &t.sets[i]
		for way := range s.ciphers {
			switch d := s.ciphers[way].Load(); {
			case d == nil:
			case d.age(before) <= 0:
				left++
			default:
				s.ciphers[way].CompareAndSwap(d, nil)
			}
		}
	}
	if left == 0 {
		r.table.CompareAndSwap(t, nil)
	}
	return left
}

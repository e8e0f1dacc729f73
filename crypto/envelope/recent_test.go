package envelope

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
)

// dataOf returns an object's encrypted data, to write to.
func dataOf(t testing.TB, stored []byte) []byte {
	t.Helper()
	_, object, _ := Split(stored)
	data, _, ok := Cut(object)
	if !ok {
		t.Fatal("the data is not the first field")
	}
	return bytes.Clone(data)
}

// TestRecentOpensNoMore: a cipher at hand opens what its value's own opens, and nothing else.
func TestRecentOpensNoMore(t *testing.T) {
	v := vectors()[0]
	f, seed := newFrame(t, &v)
	other, err := NewSeed(TypeSeed, fill(9, 32))
	if err != nil {
		t.Fatal(err)
	}
	stored, err := f.Seal(nil, []byte("k"), []byte("a plaintext"))
	if err != nil {
		t.Fatal(err)
	}
	data, recent := dataOf(t, stored), new(Recent)
	for range 3 {
		got, err := seed.OpenRecent(recent, 0, nil, []byte("k"), data)
		if err != nil || string(got) != "a plaintext" {
			t.Fatalf("open = %q, %v", got, err)
		}
	}
	if recent.get(seed, data[:infoSize], 0) == nil {
		t.Error("the cipher is not kept")
	}
	refuse := func(what string, s *Seed, key string, data []byte) {
		t.Helper()
		if got, err := s.OpenRecent(recent, 0, nil, []byte(key), data); !errors.Is(err, ErrOpen) {
			t.Errorf("%s: open = %q, %v", what, got, err)
		}
	}
	refuse("another key", seed, "l", data)
	refuse("another seed", other, "k", data)
	for i := range data {
		bad := bytes.Clone(data)
		bad[i] ^= 1
		refuse("changed", seed, "k", bad)
		refuse("truncated", seed, "k", data[:i])
	}
	recent.Clear()
	if recent.get(seed, data[:infoSize], 0) != nil {
		t.Error("the cipher is still there")
	}
}

// TestRecentIsShared opens many values at once, more than there are slots.
func TestRecentIsShared(t *testing.T) {
	v := vectors()[0]
	f, seed := newFrame(t, &v)
	recent := new(Recent)
	var wg sync.WaitGroup
	var sealed [200][]byte
	for i := range sealed {
		stored, err := f.Seal(nil, []byte("k"), []byte{byte(i)})
		if err != nil {
			t.Fatal(err)
		}
		sealed[i] = dataOf(t, stored)
	}
	for w := range 4 {
		wg.Go(func() {
			for i := range 2000 {
				n := (i*7 + w) % len(sealed)
				got, err := seed.OpenRecent(recent, 0, nil, []byte("k"), sealed[n])
				if err != nil || len(got) != 1 || got[0] != byte(n) {
					t.Errorf("value %d: %v, %v", n, got, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestRecentKeepsAList: what is read repeatedly is kept, nearly all of it, up to 10,000 values, and
// a part of a longer list; what is read once is not.
func TestRecentKeepsAList(t *testing.T) {
	seed, aead := seedAndCipher(t)
	random := rand.New(rand.NewPCG(1, 2))
	list := make([][]byte, 30_000)
	for i := range list {
		list[i] = make([]byte, infoSize)
		for j := range list[i] {
			list[i][j] = byte(random.Uint32())
		}
	}
	for n, least := range map[int]int{100: 100, 10_000: 9000, 30_000: 6000} {
		recent := new(Recent)
		kept := func() (kept int) {
			for _, info := range list[:n] {
				if recent.get(seed, info, 0) != nil {
					kept++
				} else {
					recent.put(seed, info, aead, 0)
				}
			}
			return kept
		}
		if once, twice := kept(), kept(); once != 0 || twice != 0 {
			t.Errorf("%d values: %d are kept that nobody has opened, and %d that were opened once", n, once, twice)
		}
		kept()
		if have := kept(); have < least {
			t.Errorf("of %d values %d are kept, want %d", n, have, least)
		}
	}
}

// seedAndCipher returns what is cached.
func seedAndCipher(t *testing.T) (*Seed, cipher.AEAD) {
	t.Helper()
	seed, err := NewSeed(TypeSeed, fill(9, 32))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := newAEAD(fill(1, 32))
	if err != nil {
		t.Fatal(err)
	}
	return seed, aead
}

// TestRecentTakesEvents: a value that is read by many is cached soon, although a long list that is
// read at the same time takes all of the room.
func TestRecentTakesEvents(t *testing.T) {
	seed, aead := seedAndCipher(t)
	random := rand.New(rand.NewPCG(5, 6))
	info := func() []byte {
		b := make([]byte, infoSize)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	recent := new(Recent)
	for range 3 * RecentBytes / cipherBytes {
		one := info()
		for range 2 {
			recent.put(seed, one, aead, 1)
		}
	}
	misses := 0
	const events, watchers = 100, 1000
	for range events {
		event := info()
		for range watchers {
			if recent.get(seed, event, 1) == nil {
				recent.put(seed, event, aead, 1)
				misses++
			}
		}
	}
	if most := events * (1 + 2*youngTurns); misses > most {
		t.Errorf("%d events were not cached %d times, want at most %d", events, misses, most)
	}
}

// TestRecentExpires: ciphers that are not used go, and the others stay.
func TestRecentExpires(t *testing.T) {
	seed, aead := seedAndCipher(t)
	info := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 7, 1}, infoSize/4) }
	recent := new(Recent)
	const n = 100
	for i := range n {
		for range 2 {
			recent.put(seed, info(i), aead, 10)
		}
	}
	for i := range n / 2 {
		if recent.get(seed, info(i), 20) == nil {
			t.Fatalf("cipher %d is not there", i)
		}
	}
	for _, tt := range []struct{ before, left int }{{10, n}, {11, n / 2}, {20, n / 2}} {
		if left := recent.Expire(uint32(tt.before)); left != tt.left {
			t.Errorf("before %d: %d are left, want %d", tt.before, left, tt.left)
		}
	}
	for i := range n {
		if have := recent.get(seed, info(i), 20) != nil; have != (i < n/2) {
			t.Errorf("cipher %d is there: %t", i, have)
		}
	}
	if left := recent.Expire(21); left != 0 || recent.table.Load() != nil {
		t.Errorf("%d are left, or their table", left)
	}
}

// TestCipherBytes: the limit is right as long as a cipher has the size that is counted.
func TestCipherBytes(t *testing.T) {
	const n = 2000
	kept := make([]*derived, n)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range kept {
		aead, err := newAEAD(fill(byte(i), 32))
		if err != nil {
			t.Fatal(err)
		}
		kept[i] = &derived{aead: aead}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if size := int64(after.HeapAlloc-before.HeapAlloc) / n; size > cipherBytes*11/10 || size < cipherBytes*9/10 {
		t.Errorf("a cipher takes %d bytes, %d are counted", size, cipherBytes)
	}
	runtime.KeepAlive(kept)
}

// TestRecentIsBounded: more ciphers than there may be replace those that were not used for longest.
func TestRecentIsBounded(t *testing.T) {
	seed, aead := seedAndCipher(t)
	random := rand.New(rand.NewPCG(3, 4))
	recent, info := new(Recent), make([]byte, infoSize)
	inUse := make([]byte, infoSize)
	const most = RecentBytes / cipherBytes
	for i := range 5 * most {
		binary.LittleEndian.PutUint64(info, random.Uint64())
		binary.LittleEndian.PutUint64(info[8:], random.Uint64())
		now := uint32(i / 2000)
		for range 2 {
			recent.put(seed, info, aead, now)
		}
		if i == 0 {
			copy(inUse, info)
		}
		if i%100 == 0 && recent.get(seed, inUse, now) == nil {
			t.Fatalf("the cipher that is always in use was replaced after %d others", i)
		}
	}
	if n := recent.Expire(0); n > most || n < most*9/10 {
		t.Errorf("%d ciphers, want up to %d", n, most)
	}
	// Fewer new ones than there is room for: those that were not used lately go.
	for now := range uint32(100) {
		for range 100 {
			binary.LittleEndian.PutUint64(info, random.Uint64())
			binary.LittleEndian.PutUint64(info[8:], random.Uint64())
			for range 2 {
				recent.put(seed, info, aead, 1<<20+now)
			}
		}
	}
	if n := recent.Expire(0); n > 100*(idleFor+1+len(recent.table.Load().sets)/100) {
		t.Errorf("%d ciphers of which most are idle", n)
	}
}

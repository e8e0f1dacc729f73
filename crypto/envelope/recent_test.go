package envelope

import (
	"bytes"
	"errors"
	"math/rand/v2"
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
		got, err := seed.OpenRecent(recent, nil, []byte("k"), data)
		if err != nil || string(got) != "a plaintext" {
			t.Fatalf("open = %q, %v", got, err)
		}
	}
	if recent.get(seed, data[:infoSize]) == nil {
		t.Error("the cipher is not kept")
	}
	refuse := func(what string, s *Seed, key string, data []byte) {
		t.Helper()
		if got, err := s.OpenRecent(recent, nil, []byte(key), data); !errors.Is(err, ErrOpen) {
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
	if recent.get(seed, data[:infoSize]) != nil {
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
				got, err := seed.OpenRecent(recent, nil, []byte("k"), sealed[n])
				if err != nil || len(got) != 1 || got[0] != byte(n) {
					t.Errorf("value %d: %v, %v", n, got, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestRecentKeepsAList: what is read over and over is kept, nearly all of it, up to ten thousand
// values; what is read once is not; and more than there is room for does not push out more than its
// share.
func TestRecentKeepsAList(t *testing.T) {
	seed, err := NewSeed(TypeSeed, fill(9, 32))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := newAEAD(fill(1, 32))
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	list := make([][]byte, 30_000)
	for i := range list {
		list[i] = make([]byte, infoSize)
		for j := range list[i] {
			list[i][j] = byte(random.Uint32())
		}
	}
	for n, least := range map[int]int{100: 100, 10_000: 9500, 30_000: 6000} {
		recent := new(Recent)
		kept := func() (kept int) {
			for _, info := range list[:n] {
				if recent.get(seed, info) != nil {
					kept++
				} else {
					recent.put(seed, info, aead)
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

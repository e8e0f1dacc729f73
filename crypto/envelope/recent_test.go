package envelope

import (
	"bytes"
	"errors"
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
	stored, err := f.Seal([]byte("k"), []byte("a plaintext"))
	if err != nil {
		t.Fatal(err)
	}
	data, recent := dataOf(t, stored), new(Recent)
	for range 3 {
		own := bytes.Clone(data)
		got, err := seed.OpenInPlace(recent, []byte("k"), own)
		if err != nil || string(got) != "a plaintext" {
			t.Fatalf("open = %q, %v", got, err)
		}
		if &got[0] != &own[infoSize] {
			t.Error("the plaintext does not stand in the data")
		}
	}
	if recent.get(seed, data[:infoSize]) == nil {
		t.Error("the cipher is not kept")
	}
	refuse := func(what string, s *Seed, key string, data []byte) {
		t.Helper()
		if got, err := s.OpenInPlace(recent, []byte(key), bytes.Clone(data)); !errors.Is(err, ErrOpen) {
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
		stored, err := f.Seal([]byte("k"), []byte{byte(i)})
		if err != nil {
			t.Fatal(err)
		}
		sealed[i] = dataOf(t, stored)
	}
	for w := range 4 {
		wg.Go(func() {
			for i := range 2000 {
				n := (i*7 + w) % len(sealed)
				got, err := seed.OpenInPlace(recent, []byte("k"), bytes.Clone(sealed[n]))
				if err != nil || len(got) != 1 || got[0] != byte(n) {
					t.Errorf("value %d: %v, %v", n, got, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

package prefix

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// keys are all short keys of a small alphabet.
func keys() []string {
	var keys []string
	for _, a := range []string{"", "\x00", "a", "b", "\xff"} {
		for _, b := range []string{"", "\x00", "a", "\xff"} {
			for _, c := range []string{"", "\x00", "b", "\xff"} {
				keys = append(keys, a+b+c)
			}
		}
	}
	return keys
}

// TestAgainstBruteForce compares all questions with their definitions.
func TestAgainstBruteForce(t *testing.T) {
	keys := keys()
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		seen, entries := map[string]bool{}, []Entry[string](nil)
		for range rng.IntN(6) {
			p := keys[rng.IntN(len(keys))]
			if !seen[p] {
				entries = append(entries, Entry[string]{p, "<" + p + ">"})
			}
			seen[p] = true
		}
		set := New(entries)
		roots := set.Roots()
		for _, key := range keys {
			want, longest, under := "", -1, 0
			for p := range seen {
				if strings.HasPrefix(key, p) && len(p) > longest {
					longest, want = len(p), "<"+p+">"
				}
			}
			for _, r := range roots {
				if strings.HasPrefix(key, r) {
					under++
				}
			}
			if got, ok := set.Lookup([]byte(key)); got != want || ok != (longest >= 0) {
				t.Fatalf("prefixes %q, key %q: %q, %v, want %q", entries, key, got, ok, want)
			}
			if (under == 1) != (longest >= 0) || under > 1 {
				t.Fatalf("prefixes %q, key %q is below %d of the roots %q", entries, key, under, roots)
			}
			for _, end := range keys {
				want := slices.ContainsFunc(entries, func(e Entry[string]) bool { return overlaps(e.Prefix, key, end) })
				if got := set.Overlaps([]byte(key), []byte(end)); got != want {
					t.Fatalf("prefixes %q, range [%q, %q): %v, want %v", entries, key, end, got, want)
				}
			}
		}
	}
}

// overlaps by definition: is there a key that begins with p and lies in the range? The least one at
// or after key decides.
func overlaps(p, key, end string) bool {
	if end == "" {
		return strings.HasPrefix(key, p)
	}
	least := max(p, key)
	return strings.HasPrefix(least, p) && (end == "\x00" || least < end)
}

func TestTheLaterOneCounts(t *testing.T) {
	set := New([]Entry[int]{{"a", 1}, {"ab", 2}, {"a", 3}})
	if got, ok := set.Lookup([]byte("ac")); got != 3 || !ok || set.Len() != 2 {
		t.Errorf("%v, %v, %d entries", got, ok, set.Len())
	}
}

package slab

import "testing"

// TestSlab: all values are distinct and zero, the first is allocated alone, and many need few
// allocations.
func TestSlab(t *testing.T) {
	var s Slab[int]
	seen := make(map[*int]bool)
	for i := range 1000 {
		v := s.New()
		if *v != 0 || seen[v] {
			t.Fatalf("value %d was handed out before", i)
		}
		if i == 0 && len(s.free) > 0 {
			t.Error("the first value was allocated with others")
		}
		*v, seen[v] = 1, true
	}
	if n := testing.AllocsPerRun(10, func() {
		for range 100 * maxSize {
			s.New()
		}
	}); n > 100 {
		t.Errorf("%v allocations for %d values", n, 100*maxSize)
	}
}

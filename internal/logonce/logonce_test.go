package logonce

import (
	"slices"
	"strconv"
	"testing"
)

func TestKeys(t *testing.T) {
	k := NewKeys(2)
	var got []bool
	for _, key := range []string{"a", "a", "b", "a", "c", "a", "b"} {
		got = append(got, k.First(key))
	}
	// c evicts b, since a was used last.
	if want := []bool{true, false, true, false, true, false, true}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	big := NewKeys(100)
	for i := range 10_000 {
		if !big.First(strconv.Itoa(i)) {
			t.Fatalf("%d is not new", i)
		}
	}
	if n := big.seen.Len(); n != 100 {
		t.Errorf("%d keys are remembered", n)
	}
}

func TestState(t *testing.T) {
	var s State
	for i, state := range []string{"", "down", "down", "up", "", ""} {
		if got, want := s.Changed(state), i == 1 || i == 3 || i == 4; got != want {
			t.Errorf("step %d, %q: changed is %v", i, state, got)
		}
	}
}

func TestSet(t *testing.T) {
	var s Set
	if begun, ended := s.Update("a", "b", "a"); !slices.Equal(begun, []string{"a", "b"}) || ended != nil {
		t.Errorf("%q, %q", begun, ended)
	}
	if begun, ended := s.Update("b", "c"); !slices.Equal(begun, []string{"c"}) || !slices.Equal(ended, []string{"a"}) {
		t.Errorf("%q, %q", begun, ended)
	}
}

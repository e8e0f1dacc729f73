package inventory

import (
	"slices"
	"testing"
)

func TestWithin(t *testing.T) {
	t.Parallel()
	roots := []string{"/a/", "/b/c/"}
	for also, want := range map[string][]string{
		"": roots, "/": roots, "/a/": {"/a/"}, "/a/x": {"/a/x"}, "/b/": {"/b/c/"}, "/z": nil,
	} {
		if got := within(roots, also); !slices.Equal(got, want) {
			t.Errorf("within %q: %q, want %q", also, got, want)
		}
	}
	if got := within([]string{""}, "/a"); !slices.Equal(got, []string{"/a"}) {
		t.Errorf("within all: %q", got)
	}
}

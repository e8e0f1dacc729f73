package docs

import (
	"reflect"
	"testing"
)

func TestParse(t *testing.T) {
	got := parse("a\n```console\n$ one --x\nout\n\nmore\n$ two \\\n   --y\n```\n1. x\n\n   ```console\n   $ three   # why\n     out\n   ```\n```sh\n$ four\n```\n")
	want := []block{{{"one --x", []string{"out", "", "more"}}, {"two --y", nil}}, {{"three   # why", []string{"  out"}}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

func TestSame(t *testing.T) {
	for _, tt := range []struct {
		want, got []string
		same      bool
	}{
		{[]string{"3 keys: 2.0 KiB, 0.1 s"}, []string{"12 keys: 17 B, 1.5 s"}, true},
		{[]string{"3 keys"}, []string{"3 values"}, false},
		{[]string{"A  B", "x  1"}, []string{"A      B", "x      22"}, true},
		{[]string{"a"}, []string{"a", "b"}, false},
		{[]string{"a", "b"}, []string{"a"}, false},
		{[]string{"a", "…"}, []string{"a", "b", "c"}, true},
		{[]string{"…", "c"}, []string{"a", "b", "c"}, true},
		{[]string{"…", "d"}, []string{"a", "b", "c"}, false},
		{[]string{"a … c"}, []string{"a b b c"}, true},
		{[]string{"a … d"}, []string{"a b b c"}, false},
		{[]string{"vm-5914b70df427  v0.1.0   2026-11-23T20:39:28Z  as here"}, []string{"b-0123456789ab  (devel)   2027-01-01T00:00:00Z  as here"}, true},
		{[]string{"vm-5914b70df427  v0.1.0   2026-11-23T20:39:28Z  as here"}, []string{"b-0123456789ab  (devel)   2027-01-01T00:00:00Z  NOT"}, false},
		{[]string{"(none"}, []string{"(none"}, true},
	} {
		if same(tt.want, tt.got) != tt.same {
			t.Errorf("%q and %q: want %t", tt.want, tt.got, tt.same)
		}
	}
}

package etcdapi

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestReach(t *testing.T) {
	own := newOwnKeys([]string{"/own/", "/z/own/"})
	for _, tt := range []struct {
		key, end string
		want     reach
		parts    string
	}{
		{"/own/", "", reachesOwn, ""},
		{"/own/k", "", reachesOwn, ""},
		{"/own", "", reachesNone, ""},
		{"/own0", "", reachesNone, ""},
		{"/", "/own/", reachesNone, ""},    // the end is not in it
		{"/", "/own/a", reachesOwn, ""},    // ends among them
		{"/own/", "/own0", reachesOwn, ""}, // all of them, and nothing else
		{"/own/b", "/own/a", reachesNone, ""},
		{"/own/b", "\x00", reachesOwn, ""}, // begins among them
		{"/own", "/own0", reachesOver, "[/own,/own/)"},
		{"/", "0", reachesOver, "[/,/own/) [/own0,/z/own/) [/z/own0,0)"},
		{"\x00", "\x00", reachesOver, "[\x00,/own/) [/own0,/z/own/) [/z/own0,\x00)"},
		{"/own0", "0", reachesOver, "[/own0,/z/own/) [/z/own0,0)"},
		{"/", "/z/own/q", reachesOwn, ""},
		{"/x", "/y", reachesNone, ""},
	} {
		got := own.reach([]byte(tt.key), []byte(tt.end))
		if got != tt.want {
			t.Errorf("[%q, %q): %d, want %d", tt.key, tt.end, got, tt.want)
		}
		if got == reachesOver {
			var parts []string
			for _, s := range own.without([]byte(tt.key), []byte(tt.end)) {
				parts = append(parts, fmt.Sprintf("[%s,%s)", s.key, s.end))
			}
			if all := strings.Join(parts, " "); all != tt.parts {
				t.Errorf("[%q, %q) without them: %q, want %q", tt.key, tt.end, all, tt.parts)
			}
		}
	}
	if newOwnKeys(nil).reach([]byte{0}, []byte{0}) != reachesNone || !newOwnKeys(nil).empty() {
		t.Error("there are own keys without a prefix")
	}
}

// TestRangesWithoutOwnKeys: whatever the range, its parts hold all of its keys but the own ones,
// each once.
func TestRangesWithoutOwnKeys(t *testing.T) {
	const alphabet = "\x00ab/\xff"
	word := func(most int) string {
		b := make([]byte, rand.IntN(most+1))
		for i := range b {
			b[i] = alphabet[rand.IntN(len(alphabet))]
		}
		return string(b)
	}
	in := func(key string, s span) bool {
		switch {
		case len(s.end) == 0:
			return key == string(s.key)
		case string(s.end) == "\x00":
			return key >= string(s.key)
		}
		return key >= string(s.key) && key < string(s.end)
	}
	over := 0
	for range 20_000 {
		own := newOwnKeys([]string{word(2) + "/", word(3) + "a/"})
		whole := span{[]byte(word(3)), []byte(word(3))}
		what := own.reach(whole.key, whole.end)
		var parts []span
		if what == reachesOver {
			parts = own.without(whole.key, whole.end)
			over++
		}
		for range 20 {
			key := word(4)
			n := 0
			for _, p := range parts {
				if in(key, p) {
					n++
				}
			}
			switch inside, isOwn := in(key, whole), own.has([]byte(key)); {
			case what == reachesNone && inside && isOwn:
				t.Fatalf("[%q, %q) holds %q, which is an own key", whole.key, whole.end, key)
			case what == reachesOver && (inside && !isOwn) != (n == 1), n > 1:
				t.Fatalf("[%q, %q) holds %q, its parts %q hold it %d times", whole.key, whole.end, key, parts, n)
			}
		}
	}
	if over < 1000 {
		t.Errorf("only %d ranges reach over own keys: this proves little", over)
	}
}

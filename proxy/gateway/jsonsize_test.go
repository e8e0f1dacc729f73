package gateway

import "testing"

// TestJSONSize: what is measured is the value that has begun, wherever it is cut.
func TestJSONSize(t *testing.T) {
	for said, want := range map[string]int64{
		``: 0, ` `: 0, `{}`: 0, `{"a":"b"} `: 0, `{"a":[1,{}]}{`: 1, `{"a`: 3, `"\"`: 3, `"\"" [`: 1, `{"}`: 3, `{"\\"}`: 0, `}}}}{`: 1, `null 123`: 3, `null 123 `: 0, `}12`: 2, `["]"`: 4,
	} {
		for each := 1; each <= len(said)+1; each++ {
			var j jsonSize
			for rest := said; rest != ""; {
				n := min(each, len(rest))
				j.add([]byte(rest[:n]))
				rest = rest[n:]
			}
			if j.n != want {
				t.Errorf("%q, cut every %d: %d, want %d", said, each, j.n, want)
			}
		}
	}
}

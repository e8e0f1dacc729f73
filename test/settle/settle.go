// Package settle prepares what clients did, with the results, for porcupine, when some of their
// requests had no response.
package settle

import "github.com/anishathalye/porcupine"

// Record is one operation of a client on a key. The values that clients write differ from each
// other.
type Record struct {
	porcupine.Operation
	Key   string
	Wrote string // the value that it writes; may be empty
	Saw   string // the value that it read; may be empty
	// Unknown says that there was no response: it may have been applied, at any time since its
	// call.
	Unknown bool
}

// Operations returns the operations on each key, none of them unknown.
//
// If there was no response to a write, but a client read its value, it was applied before that
// client had its response. If no client read it, it makes no difference: the result of every
// operation that depends on the state shows what it read. So an order exists with the write if, and
// only if, one exists without it, and porcupine need not try every moment for it, which takes too
// long.
func Operations[R any](records []R, as func(R) Record) map[string][]porcupine.Operation {
	type place struct{ key, value string }
	seen := make(map[place]int64)
	for _, each := range records {
		r := as(each)
		at := place{r.Key, r.Saw}
		if first, ok := seen[at]; !r.Unknown && r.Saw != "" && (!ok || r.Return < first) {
			seen[at] = r.Return
		}
	}
	parts := make(map[string][]porcupine.Operation)
	for _, each := range records {
		r := as(each)
		if r.Unknown {
			first, ok := seen[place{r.Key, r.Wrote}]
			if !ok || r.Wrote == "" {
				continue
			}
			// a value that is read before it was written fits nowhere, and porcupine reports it
			r.Return = max(first, r.Call)
		}
		parts[r.Key] = append(parts[r.Key], r.Operation)
	}
	return parts
}

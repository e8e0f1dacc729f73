package linear

import (
	"testing"

	"github.com/anishathalye/porcupine"
)

// TestModels passes impossible histories to the models, and similar ones that are possible. The
// operations are sequential unless they have times.
func TestModels(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		step    func(state, in any) (bool, any)
		initial any
		records []record
		legal   bool
	}{
		"a value is read":                      {register, "", does(put{"a"}, get{"a"}), true},
		"a write is lost":                      {register, "", does(put{"a"}, get{""}), false},
		"two swaps of one value":               {register, "", does(put{"a"}, swap{"a", "b"}, swap{"a", "c"}), false},
		"a swap is refused for nothing":        {register, "", does(put{"a"}, kept{"a", "a"}), false},
		"a swap is refused":                    {register, "", does(put{"a"}, put{"b"}, kept{"a", "b"}), true},
		"a write without an answer is seen":    {register, "", append(does(put{"a"}), unknown(put{"b"}, "b", 3), sees(get{"b"}, "b", 4)), true},
		"it is seen before it was asked for":   {register, "", append(does(put{"a"}), sees(get{"b"}, "b", 3), unknown(put{"b"}, "b", 9)), false},
		"it is seen, and then gone":            {register, "", append(does(put{"a"}), unknown(put{"b"}, "b", 3), sees(get{"b"}, "b", 4), sees(get{"a"}, "a", 6)), false},
		"it is not seen":                       {register, "", append(does(put{"a"}), unknown(put{"b"}, "b", 3), sees(get{"a"}, "a", 4)), true},
		"a holder follows another":             {locking, guarded{}, does(put{"a"}, enter{1}, look{1, "a"}, change{1, "a", "b"}, leave{1}, enter{2}, look{2, "b"}), true},
		"two holders at once":                  {locking, guarded{}, does(put{"a"}, enter{1}, enter{2}, change{1, "a", "b"}), false},
		"a holder that left":                   {locking, guarded{}, does(put{"a"}, enter{1}, leave{1}, change{1, "a", "b"}), false},
		"a holder whose lease ended":           {locking, guarded{}, does(put{"a"}, enter{1}, barred{1}, enter{2}, barred{1}, look{2, "a"}), true},
		"a holder that was barred, and is not": {locking, guarded{}, does(put{"a"}, enter{1}, barred{1}, look{1, "a"}), false},
		"a later holder with an older key":     {locking, guarded{}, does(put{"a"}, enter{2}, enter{1}), false},
		"somebody wrote beside the holder":     {locking, guarded{}, does(put{"a"}, enter{1}, look{1, "a"}, differ{1, "a", "b"}), false},
		"a leader follows another":             {electing, ballot{}, does(nobody{}, won{1, "a"}, leads{1, "a"}, proclaimed{1, "b"}, resigned{1}, nobody{}, won{2, "c"}, lost{1}, leads{2, "c"}), true},
		"two leaders at once":                  {electing, ballot{}, does(won{1, "a"}, won{2, "c"}, proclaimed{1, "b"}), false},
		"a leader that was refused":            {electing, ballot{}, does(won{1, "a"}, lost{1}, proclaimed{1, "b"}), false},
		"a leader that resigned":               {electing, ballot{}, does(won{1, "a"}, resigned{1}, leads{1, "a"}), false},
		"an answer of before":                  {electing, ballot{}, does(won{1, "a"}, proclaimed{1, "b"}, leads{1, "a"}), false},
		"an older leader":                      {electing, ballot{}, does(won{1, "a"}, leads{2, "x-campaign-1"}, leads{1, "a"}), false},
		"nobody, and the same leader again":    {electing, ballot{}, does(won{1, "a"}, nobody{}, leads{1, "a"}), false},
		"a leader is seen before it is told":   {electing, ballot{}, does(leads{1, "x-campaign-1"}, won{1, "x-campaign-1"}), true},
		"a first value that was proclaimed":    {electing, ballot{}, does(leads{1, "x-proclaim-1"}), false},
	} {
		h := newHistory()
		h.records = tt.records
		want := porcupine.Illegal
		if tt.legal {
			want = porcupine.Ok
		}
		for _, part := range h.settled() {
			if got, _ := judge(part, tt.step, tt.initial); got != want {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
		}
	}
}

func does(ops ...any) (records []record) {
	for n, op := range ops {
		records = append(records, record{in: op, call: int64(2*n + 1), ret: int64(2*n + 2)})
	}
	return records
}

func sees(op any, value string, at int64) record {
	return record{in: op, call: at, ret: at + 1, saw: value}
}

func unknown(op any, value string, at int64) record {
	return record{in: op, call: at, ret: at + 1, wrote: value, unknown: true}
}

//go:build !race

// The race detector makes sync.Pool drop what it is given at random, so allocations are counted
// without it.

package etcdwire

import "testing"

// TestAllocations: messages that stay as they are, and values, need no memory but the result.
func TestAllocations(t *testing.T) {
	rules := new(untouched)
	for _, m := range methods {
		msg := wire(t, samples()[m.name][0])
		run := func() {
			if out, err := m.rewrite(msg, rules); err != nil || !m.answer && !same(out, msg) {
				t.Fatalf("%s: changed or failed: %v", m.name, err)
			}
		}
		want := 0.0
		if m.answer || m.name == "PutRequest" {
			want = 1 // where the result goes
		}
		// A transaction with keys_only ranges must remember them.
		if n := testing.AllocsPerRun(100, run); n > want && m.name != "TxnRequest" {
			t.Errorf("%s: %v allocations, want %v", m.name, n, want)
		}
	}
	if rules.seals == 0 || rules.opens == 0 {
		t.Error("the rules were never asked")
	}
}

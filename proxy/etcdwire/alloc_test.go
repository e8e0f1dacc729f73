//go:build !race

// The race detector makes sync.Pool drop what it is given at random, so allocations are counted
// without it.

package etcdwire

import "testing"

// TestAllocations keeps the path of untouched messages free of allocations.
func TestAllocations(t *testing.T) {
	rules := new(untouched)
	for _, m := range methods {
		msg := wire(t, samples()[m.name][0])
		run := func() {
			if out, err := m.rewrite(msg, rules); err != nil || !same(out, msg) {
				t.Fatalf("%s: changed or failed: %v", m.name, err)
			}
		}
		// A txn with keys_only ranges must remember them.
		if n := testing.AllocsPerRun(100, run); n > 0 && m.name != "TxnRequest" {
			t.Errorf("%s: %v allocations, want none", m.name, n)
		}
	}
	if rules.seals == 0 || rules.opens == 0 {
		t.Error("the rules were never asked")
	}
}

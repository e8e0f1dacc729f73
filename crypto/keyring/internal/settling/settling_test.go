package settling

import (
	"fmt"
	"testing"
	"time"
)

// TestKeyIDs follows what a KMS names over time.
func TestKeyIDs(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	type step struct {
		after         time.Duration // since the start
		named, use    string
		began, report bool
	}
	for name, steps := range map[string][]step{
		"new key IDs are used at once": {
			{0, "a", "a", false, false}, {1, "b", "b", false, false}, {2, "c", "c", false, false},
		},
		"a former one is held for an hour": {
			{0, "a", "a", false, false}, {time.Minute, "b", "b", false, false},
			{2 * time.Minute, "a", "b", true, true}, {time.Hour, "a", "b", false, false},
			{62 * time.Minute, "a", "a", false, false}, {63 * time.Minute, "b", "a", true, true},
		},
		"a break begins the hour again": {
			{0, "a", "a", false, false}, {1, "b", "b", false, false}, {2, "a", "b", true, true},
			{time.Minute, "b", "b", false, false}, {2 * time.Minute, "a", "b", true, false},
			{61 * time.Minute, "a", "b", false, false}, {62 * time.Minute, "a", "a", false, false},
		},
		"after a day a former one is new": {
			{0, "a", "a", false, false}, {1, "b", "b", false, false}, {25 * time.Hour, "a", "a", false, false},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var k KeyIDs
			inUse := ""
			for i, s := range steps {
				use, began, report := k.Decide(inUse, s.named, start.Add(s.after))
				if use != s.use || began != s.began || report != s.report {
					t.Errorf("step %d: %q, %v, %v; want %q, %v, %v", i, use, began, report, s.use, s.began, s.report)
				}
				if held := use != s.named; k.Held(s.named) != held {
					t.Errorf("step %d: held is %v", i, !held)
				}
				inUse = use
			}
		})
	}
}

// TestFormerAreBounded: the memory does not grow with the number of key IDs.
func TestFormerAreBounded(t *testing.T) {
	var k KeyIDs
	inUse := ""
	for i := range 10 * maxFormer {
		inUse, _, _ = k.Decide(inUse, fmt.Sprint(i), time.Unix(int64(i), 0))
	}
	if len(k.former) > maxFormer {
		t.Errorf("%d former key IDs are kept", len(k.former))
	}
}

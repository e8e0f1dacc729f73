package hottable

import (
	"fmt"
	"testing"
)

func TestTable(t *testing.T) {
	var table Table[int]
	const keys = 1000
	key := func(i int) []byte { return fmt.Appendf(nil, "%0*d", 1+i%60, i) }
	values := make([]int, keys)
	for i := range keys {
		if table.Get(key(i)) != nil {
			t.Fatalf("key %d is there before it was put", i)
		}
		values[i] = i
		k := key(i)
		table.Put(k, &values[i])
		clear(k) // it was copied
		if got := table.Get(key(i)); got != &values[i] {
			t.Fatalf("key %d: %v", i, got)
		}
	}
	kept := 0
	for i := range keys {
		if got := table.Get(key(i)); got != nil {
			kept++
			if *got != i {
				t.Errorf("key %d has the value of %d", i, *got)
			}
		}
	}
	if kept > len(table.slots) || kept < len(table.slots)/2 {
		t.Errorf("%d keys are kept in %d slots", kept, len(table.slots))
	}
}

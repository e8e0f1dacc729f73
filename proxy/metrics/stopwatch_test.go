package metrics

import (
	"testing"

	dto "github.com/prometheus/client_model/go"
)

// TestStopwatch: what happens while it is stopped does not count, and what was discarded is not
// shown.
func TestStopwatch(t *testing.T) {
	m, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	h := m.added
	count := func() uint64 {
		var m dto.Metric
		if err := h.Write(&m); err != nil {
			t.Fatal(err)
		}
		return m.GetHistogram().GetSampleCount()
	}
	var off Stopwatch
	off.Start()
	off.Observe(h)
	discarded := Stopwatch{On: true}
	discarded.Start()
	discarded.Discard()
	discarded.Stop()
	discarded.Start()
	discarded.Observe(h)
	if n := count(); n != 0 {
		t.Errorf("%d observations of what was off or discarded", n)
	}
	on := Stopwatch{On: true}
	on.Start()
	on.Stop()
	on.Start()
	on.Start() // goes on
	on.Observe(h)
	on.Start()
	on.Observe(h) // was observed
	if n := count(); n != 1 {
		t.Errorf("%d observations, want 1", n)
	}
	allocated := testing.AllocsPerRun(1000, func() {
		w := Stopwatch{On: true}
		w.Start()
		w.Stop()
		w.Start()
		w.Observe(h)
	})
	if allocated != 0 {
		t.Errorf("measuring a call takes %v allocations", allocated)
	}
}

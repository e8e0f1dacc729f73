package metrics

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// sampleEvery is how many unary calls of a connection there are for each that is measured.
const sampleEvery = 16

// Sampled says whether the n-th unary call of a connection is measured, counted from 0. The second
// one is, since the first may wait for the connection to etcd, and then does not count.
func Sampled(n uint64) bool { return n%sampleEvery == 0 || n == 1 }

// Stopwatch measures the time that the proxy adds to one call: it runs while the call is here, and
// stands while the call is etcd's. The zero value measures nothing, and costs nothing. It is safe
// for concurrent use; the goroutine that hands the call on starts or stops it.
type Stopwatch struct {
	On    bool         // does not change once the call has begun
	since atomic.Int64 // when it was started, on the process' clock; 0 while it stands
	spent atomic.Int64 // nanoseconds before that; notMeasured if the call does not count
}

// notMeasured is far below 0, so that what is still added to it does not matter.
const notMeasured = math.MinInt64 / 2

// processStart is the zero of the stopwatches' clock, which is monotonic.
var processStart = time.Now()

// clock returns nanoseconds; never 0.
func clock() int64 { return max(int64(time.Since(processStart)), 1) }

// Start starts the stopwatch, if it is stopped.
func (w *Stopwatch) Start() {
	if w.On {
		w.since.CompareAndSwap(0, clock())
	}
}

// Stop stops the stopwatch, and adds the time since Start.
func (w *Stopwatch) Stop() {
	if !w.On {
		return
	}
	if since := w.since.Swap(0); since != 0 {
		w.spent.Add(clock() - since)
	}
}

// Discard has the call not count: it went another way, or it waited for a connection to etcd.
func (w *Stopwatch) Discard() {
	if w.On {
		w.spent.Store(notMeasured)
	}
}

// Observe stops the stopwatch for good and shows the sum to o, in seconds.
func (w *Stopwatch) Observe(o prometheus.Observer) {
	if !w.On {
		return
	}
	w.Stop()
	if n := w.spent.Swap(notMeasured); n >= 0 {
		o.Observe(time.Duration(n).Seconds())
	}
}

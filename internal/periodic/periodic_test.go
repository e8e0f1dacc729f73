package periodic

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestRun: f is called at once and at each interval, never twice at a time, and not after the end.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		begun := time.Now()
		var calls []time.Duration
		Run(ctx, 2*time.Second, func() {
			calls = append(calls, time.Since(begun))
			if len(calls) == 1 {
				time.Sleep(3 * time.Second) // the call that was due meanwhile follows
			}
		})
		if want := []time.Duration{0, 3 * time.Second, 4 * time.Second}; !slices.Equal(calls, want) {
			t.Errorf("called after %v, want %v", calls, want)
		}
		if ended := time.Since(begun); ended != 5*time.Second {
			t.Errorf("ended after %v", ended)
		}
	})
}

// TestWait: a wait ends after its time, or with its context.
func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		begun := time.Now()
		if err := Wait(ctx, 3*time.Second); err != nil || time.Since(begun) != 3*time.Second {
			t.Errorf("waited %v: %v", time.Since(begun), err)
		}
		if err := Wait(ctx, 3*time.Second); err == nil || time.Since(begun) != 5*time.Second {
			t.Errorf("waited %v: %v", time.Since(begun), err)
		}
	})
}

package linear

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// record is one operation of a client.
type record struct {
	client int
	key    string // what it is about; each is checked separately
	in     any
	call   int64
	ret    int64  // 0: it succeeded as recorded
	wrote  string // a value that no other client writes
	saw    string // a value that was read
	// unknown says that there was no response: it may have been applied, at any time since its
	// call.
	unknown bool
}

// history is what clients did, with the results.
type history struct {
	begun   time.Time
	mu      sync.Mutex
	records []record
	counts  map[int]int
	unknown int
}

func newHistory() *history { return &history{begun: time.Now(), counts: make(map[int]int)} }

func (h *history) now() int64 { return time.Since(h.begun).Nanoseconds() + 1 }

func (h *history) add(r record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.ret == 0 {
		r.ret = h.now()
	}
	if r.unknown {
		h.unknown++
	}
	h.records = append(h.records, r)
}

// answered counts the responses of a client.
func (h *history) answered(client, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[client] += n
}

func (h *history) answers() map[int]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.counts)
}

// settled returns the operations on each key, none of them unknown.
//
// If there was no response to a write, but a client read its value, it was applied before that
// client had its response. If no client read it, it makes no difference: the result of every
// operation that depends on the state shows what it read. So an order exists with the write if, and
// only if, one exists without it, and porcupine need not try every moment for it, which takes too
// long.
func (h *history) settled() map[string][]porcupine.Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	type place struct{ key, value string }
	seen := make(map[place]int64)
	for _, r := range h.records {
		at := place{r.key, r.saw}
		if first, ok := seen[at]; !r.unknown && r.saw != "" && (!ok || r.ret < first) {
			seen[at] = r.ret
		}
	}
	parts := make(map[string][]porcupine.Operation)
	for _, r := range h.records {
		if r.unknown {
			var ok bool
			if r.ret, ok = seen[place{r.key, r.wrote}]; !ok || r.wrote == "" {
				continue
			}
			// a value that is read before it was written fits nowhere, and porcupine reports it
			r.ret = max(r.ret, r.call)
		}
		parts[r.key] = append(parts[r.key], porcupine.Operation{ClientId: r.client, Input: r.in, Call: r.call, Return: r.ret})
	}
	return parts
}

// check fails the test if no order explains the results, or if none is found in time.
func (h *history) check(t *testing.T, step func(state, in any) (bool, any), initial any) {
	t.Helper()
	for key, part := range h.settled() {
		result, info := judge(part, step, initial)
		switch result {
		case porcupine.Illegal:
			path := filepath.Join(os.TempDir(), "etcd-kms-proxy-linear.html")
			_ = porcupine.VisualizePath(model(step, initial), info, path)
			t.Errorf("%s: what clients saw in %d operations cannot have happened: see %s", key, len(part), path)
		case porcupine.Unknown:
			t.Errorf("%s: the check of %d operations did not come to an end", key, len(part))
		}
	}
	t.Logf("%d operations, %d without an answer", len(h.records), h.unknown)
}

func judge(part []porcupine.Operation, step func(state, in any) (bool, any), initial any) (porcupine.CheckResult, porcupine.LinearizationInfo) {
	return porcupine.CheckOperationsVerbose(model(step, initial), part, 30*time.Second)
}

// model returns a porcupine model: the result of an operation is part of its input.
func model(step func(state, in any) (bool, any), initial any) porcupine.Model {
	return porcupine.Model{
		Init:              func() any { return initial },
		Step:              func(state, in, _ any) (bool, any) { return step(state, in) },
		DescribeOperation: func(in, _ any) string { return fmt.Sprintf("%T%+v", in, in) },
	}
}

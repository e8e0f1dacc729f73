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

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/settle"
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

// settling returns a record as package settle takes it.
func settling(r record) settle.Record {
	return settle.Record{
		Operation: porcupine.Operation{ClientId: r.client, Input: r.in, Call: r.call, Return: r.ret},
		Key:       r.key, Wrote: r.wrote, Saw: r.saw, Unknown: r.unknown,
	}
}

// settled returns the operations on each key, none of them unknown.
func (h *history) settled() map[string][]porcupine.Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	return settle.Operations(h.records, settling)
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

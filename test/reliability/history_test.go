package reliability

import (
	"fmt"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/settle"
)

// The operations on a register, with their results.
type (
	get  struct{ value string }
	put  struct{ value string }
	swap struct{ old, value string } // by a compare of values, which succeeded
	kept struct{ old, value string } // the compare failed: the value is another one
)

// model is one key of etcd. The result of an operation is part of its input.
var model = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, in, _ any) (bool, any) {
		switch i := in.(type) {
		case get:
			return i.value == state, state
		case put:
			return true, i.value
		case swap:
			return i.old == state, i.value
		case kept:
			return i.value == state && i.old != state, state
		}
		return false, state
	},
	DescribeOperation: func(in, _ any) string { return fmt.Sprintf("%T%+v", in, in) },
}

// record is one operation of a client.
type record struct {
	client    int
	key       string
	in        any
	call, ret int64
	wrote     string // a value that no other client writes
	saw       string // a value that was read
	unknown   bool   // no response: it may have been applied, at any time since its call
}

// history is what clients did, with the results.
type history struct {
	begun   time.Time
	mu      sync.Mutex
	records []record
	unknown int // of the records
	errors  int // requests that are not in the records
}

func newHistory() *history { return &history{begun: time.Now()} }

func (h *history) now() int64 { return time.Since(h.begun).Nanoseconds() + 1 }

func (h *history) add(r record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.ret = h.now()
	if r.unknown {
		h.unknown++
	}
	h.records = append(h.records, r)
}

// failed counts a request whose result does not matter.
func (h *history) failed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.errors++
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

// check returns how many operations of how many registers were checked.
func (h *history) check(s *site) (operations, registers int) {
	s.t.Helper()
	written := make(map[string]bool)
	for _, r := range h.records {
		written[r.wrote] = true
	}
	for _, r := range h.records {
		if !r.unknown && r.saw != "" && !written[r.saw] {
			s.report.wrong(r.key + ": a client read a value that was not written")
		}
	}
	for key, part := range h.settled() {
		operations, registers = operations+len(part), registers+1
		if result := porcupine.CheckOperationsTimeout(model, part, 30*time.Second); result != porcupine.Ok {
			s.report.bad(&s.report.Illegal, fmt.Sprintf("%s: porcupine says %s of %d operations", key, result, len(part)))
		}
	}
	return operations, registers
}

package compose

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/settle"
)

// The operations on a register, with their results.
type (
	read  struct{ value string }
	write struct{ value string }
	swap  struct{ old, value string } // by a compare of the value, which succeeded
	kept  struct{ old, value string } // the compare failed: the value is this one
)

// register is one key of etcd, as a porcupine model.
var register = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, in, _ any) (bool, any) {
		switch i := in.(type) {
		case read:
			return i.value == state, state
		case write:
			return true, i.value
		case swap:
			return i.old == state, i.value
		case kept:
			return i.value == state && i.old != state, state
		}
		return false, state
	},
}

// record is one operation of a client. Every value is written once, by one client.
type record struct {
	client  int
	key     string
	in      any
	call    int64
	ret     int64
	wrote   string // the value that it writes, if any
	saw     string // the value that it read, if any
	unknown bool   // there was no response: it may have been applied, at any time since its call
}

// history is what all clients did. It is safe for concurrent use.
type history struct {
	begun   time.Time
	mu      sync.Mutex
	records []record
}

func (h *history) now() int64 { return time.Since(h.begun).Nanoseconds() }

func (h *history) add(r record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.ret = h.now()
	h.records = append(h.records, r)
}

// settling returns a record as package settle takes it.
func settling(r record) settle.Record {
	return settle.Record{
		Operation: porcupine.Operation{ClientId: r.client, Input: r.in, Call: r.call, Return: r.ret},
		Key:       r.key, Wrote: r.wrote, Saw: r.saw, Unknown: r.unknown,
	}
}

// check fails the test if no sequential order of the operations explains their results.
func (h *history) check(t *testing.T) {
	t.Helper()
	parts, unknown := settle.Operations(h.records, settling), 0
	for _, r := range h.records {
		if r.unknown {
			unknown++
		}
	}
	for key, part := range parts {
		if result := porcupine.CheckOperationsTimeout(register, part, time.Minute); result != porcupine.Ok {
			t.Errorf("%s: %d operations are %s: no order explains what clients saw", key, len(part), result)
		}
	}
	t.Logf("%d operations on %d keys, %d without a response", len(h.records), len(parts), unknown)
	if len(h.records) < 1000 {
		t.Error(fmt.Errorf("%d operations prove little", len(h.records)))
	}
}

package reencrypt

import (
	"slices"
	"strings"
	"sync"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// tally counts what a run does. It is safe for concurrent use.
type tally struct {
	mu   sync.Mutex
	done Progress
	left []Skipped
	span inventory.Span
	todo bool // this pass found something to do
}

// progress returns the counts so far.
func (t *tally) progress() Progress {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.done
}

func (t *tally) result() Result {
	t.mu.Lock()
	defer t.mu.Unlock()
	left := slices.SortedFunc(slices.Values(t.left), func(a, b Skipped) int { return strings.Compare(a.Key, b.Key) })
	if left == nil {
		left = []Skipped{} // as JSON has it
	}
	return Result{Progress: t.done, Skipped: left, Revisions: t.span}
}

// count changes the counts.
func (t *tally) count(change func(p *Progress)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(&t.done)
}

// skip skips a key.
func (t *tally) skip(counter func(p *Progress) *int64, key []byte, why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*counter(&t.done)++
	if len(t.left) < MaxSkipped {
		t.left = append(t.left, Skipped{Key: string(key), KeyBytes: inventory.KeyBytes(string(key)), Why: why})
	}
}

// skippedForeign and the functions that follow return the counters of skipped values.
func skippedForeign(p *Progress) *int64       { return &p.Foreign }
func skippedPlaintext(p *Progress) *int64     { return &p.Plaintext }
func skippedUndecryptable(p *Progress) *int64 { return &p.Undecryptable }
func skippedRefused(p *Progress) *int64       { return &p.Refused }
func skippedFailed(p *Progress) *int64        { return &p.Failed }

// foundWork records that this pass found something to do, so that another pass must confirm that
// nothing is left.
func (t *tally) foundWork() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.todo = true
}

// wrote counts the items of one transaction, applied at a revision.
func (t *tally) wrote(items []*item, revision int64) {
	t.count(func(p *Progress) {
		for _, i := range items {
			p.Bytes += int64(len(i.key) + len(i.value))
			if i.decrypts {
				p.Decrypted++
			}
		}
		p.Rewritten += int64(len(items))
		p.Transactions++
		t.span.Last = max(t.span.Last, revision)
	})
}

// beginPass resets what is counted for each pass.
func (t *tally) beginPass() {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := &t.done
	p.Pass++
	p.Keys, p.Foreign, p.Plaintext, p.Undecryptable, p.Refused, p.Failed = 0, 0, 0, 0, 0, 0
	t.left, t.todo = t.left[:0], false
}

// hasRead notes the revisions that a pass has read at.
func (t *tally) hasRead(span inventory.Span) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.span.First == 0 {
		t.span.First = span.First
	}
	t.span.Last = max(t.span.Last, span.Last)
}

// needsAnother reports whether another pass must confirm that nothing is left.
func (t *tally) needsAnother() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.todo
}

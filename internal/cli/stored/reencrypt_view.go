package stored

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/term"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
)

// reencryptView shows the progress of a run: a bar on a terminal, otherwise a line from time to
// time. Its methods are safe for concurrent use.
type reencryptView struct {
	w        io.Writer
	terminal bool

	mu      sync.Mutex
	bar     *progressbar.ProgressBar // nil between runs, and without a terminal
	pass    int                      // of the bar
	planned reencrypt.Result
	begun   time.Time
	last    time.Time // of the last line
}

// lineInterval is the time between two lines without a terminal.
const lineInterval = 10 * time.Second

func newReencryptView(w io.Writer) *reencryptView {
	f, ok := w.(*os.File)
	return &reencryptView{w: w, terminal: ok && term.IsTerminal(int(f.Fd())), last: time.Now()}
}

// printLine prints a line, above the bar if there is one.
func (v *reencryptView) printLine(format string, args ...any) {
	// a closed standard error ends the command
	_, _ = v.Write([]byte(printable.Sprintf(format+"\n", args...)))
}

// Write implements [io.Writer].
func (v *reencryptView) Write(line []byte) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.bar != nil {
		_ = v.bar.Clear() // the next step draws it again
	}
	return v.w.Write(bytes.Clone(line))
}

// begin begins to show a run. planned is the result of the dry run.
func (v *reencryptView) begin(planned reencrypt.Result) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.planned, v.pass, v.begun = planned, 0, time.Now()
}

// end removes the bar.
func (v *reencryptView) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.bar != nil {
		_ = v.bar.Clear() // an error is that of a closed terminal
		v.bar = nil
	}
}

// progress shows the progress of a run: the rewritten values of the first pass, and the keys that
// later passes and the dry run have read.
func (v *reencryptView) progress(p reencrypt.Progress) {
	v.mu.Lock()
	defer v.mu.Unlock()
	planning := v.begun.IsZero()
	done, total, what := p.Keys, v.planned.Keys, "checking"
	switch {
	case planning:
		what = "counting"
	case p.Pass == 1:
		done, total, what = p.Rewritten+p.Raced, v.planned.Rewritten, "rewriting"
	}
	if v.terminal && total > 0 {
		v.draw(p.Pass, what, done, total)
		return
	}
	if time.Since(v.last) < lineInterval {
		return
	}
	v.last = time.Now()
	line := fmt.Sprintf("%s: %d", what, done)
	if total > 0 {
		line += fmt.Sprintf(" of %d", total)
	}
	if p.Pass == 1 && total > 0 && done > 0 {
		perSecond := float64(done) / time.Since(v.begun).Seconds()
		line += fmt.Sprintf(", %.0f a second, %s left", perSecond, time.Duration(float64(max(0, total-done))/perSecond*1e9).Round(time.Second))
	}
	printable.Fprintf(v.w, "%s\n", line)
}

// draw updates the bar of a pass. mu is held.
func (v *reencryptView) draw(pass int, what string, done, total int64) {
	if v.bar == nil || v.pass != pass {
		if v.bar != nil {
			_ = v.bar.Clear() // an error is that of a closed terminal
		}
		v.pass, v.bar = pass, progressbar.NewOptions64(total, progressbar.OptionSetWriter(v.w), progressbar.OptionSetDescription(what),
			progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetItsString("values"), progressbar.OptionSetPredictTime(true),
			progressbar.OptionThrottle(100*time.Millisecond))
	}
	_ = v.bar.Set64(min(done, v.bar.GetMax64())) // an error is that of a closed terminal
}

// paused shows what a run waits for.
func (v *reencryptView) paused(what, why string) {
	if why == "" {
		v.printLine("continuing (%s)", what)
	} else {
		v.printLine("waiting (%s): %s", what, why)
	}
}

// showCost shows what a run will cost etcd.
func (v *reencryptView) showCost(p reencrypt.Result, members []*clientv3.StatusResponse) {
	if p.Rewritten == 0 {
		return
	}
	v.printLine("%d of %s will be rewritten: %s, an event for the watchers of each value, and at least %s in etcd's database until it is compacted and defragmented",
		p.Rewritten, printable.Count(p.Keys, "value", "values"), printable.Count(p.Transactions, "revision", "revisions"), size(p.Bytes))
	for _, m := range members {
		// Without a compaction meanwhile, the database grows by all of it.
		if m.DbSizeQuota > 0 && m.DbSizeInUse+p.Bytes > m.DbSizeQuota*8/10 {
			v.printLine("warning: member %x uses %s of its quota of %s: compact and defragment first, or raise --quota-backend-bytes",
				m.Header.MemberId, size(m.DbSizeInUse), size(m.DbSizeQuota))
		}
		for _, e := range m.Errors {
			v.printLine("warning: member %x reports %s", m.Header.MemberId, strings.TrimSpace(e))
		}
	}
}

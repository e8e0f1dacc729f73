package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/term"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle"
)

// reencryptView shows a run: a bar on a terminal, and lines now and then otherwise. Its methods are safe for concurrent use.
type reencryptView struct {
	w        io.Writer
	terminal bool

	mu    sync.Mutex
	bar   *progressbar.ProgressBar // nil between runs, and without a terminal
	last  time.Time                // of the last line
	total int64
	keys  map[string]bool // left
	list  []reencryptLeft
}

// lineEvery is the time between two lines where there is no terminal.
const lineEvery = 10 * time.Second

func newReencryptView(w io.Writer) *reencryptView {
	f, ok := w.(*os.File)
	return &reencryptView{w: w, terminal: ok && term.IsTerminal(int(f.Fd())), last: time.Now(), keys: make(map[string]bool)}
}

// say prints a line, above the bar if there is one.
func (v *reencryptView) say(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.line(format, args...)
}

// line is say with mu held.
func (v *reencryptView) line(format string, args ...any) {
	if v.bar != nil {
		_ = v.bar.Clear() // the bar is drawn again at the next step
	}
	fmt.Fprintf(v.w, format+"\n", args...)
}

// begin starts showing a run over about total keys.
func (v *reencryptView) begin(total int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.total = total
	if v.terminal {
		v.bar = progressbar.NewOptions64(max(1, total), progressbar.OptionSetWriter(v.w), progressbar.OptionSetDescription("reencrypt"), progressbar.OptionShowCount(),
			progressbar.OptionShowIts(), progressbar.OptionSetItsString("keys"), progressbar.OptionSetPredictTime(true), progressbar.OptionClearOnFinish(),
			progressbar.OptionThrottle(100*time.Millisecond))
	}
}

// end takes the bar away.
func (v *reencryptView) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.bar != nil {
		_ = v.bar.Clear() // nothing is left to do if the terminal is gone
		v.bar = nil
	}
}

func (v *reencryptView) planning(p lifecycle.Progress) { v.show("looked at", p) }
func (v *reencryptView) progress(p lifecycle.Progress) { v.show("done with", p) }

func (v *reencryptView) show(verb string, p lifecycle.Progress) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.bar != nil:
		_ = v.bar.Set64(min(p.Keys, v.total))
	case time.Since(v.last) >= lineEvery:
		v.last = time.Now()
		fmt.Fprintf(v.w, "%s %d keys, %d rewritten\n", verb, p.Keys, p.Rewritten)
	}
}

func (v *reencryptView) paused(what, why string) {
	if why == "" {
		v.say("going on (%s)", what)
	} else {
		v.say("waiting (%s): %s", what, why)
	}
}

// left notes a key that was not rewritten, once over all passes.
func (v *reencryptView) left(key string, why error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.list) < maxLeft && !v.keys[key] {
		v.keys[key] = true
		v.list = append(v.list, reencryptLeft{key, why.Error()})
	}
}

func (v *reencryptView) leftKeys() []reencryptLeft {
	v.mu.Lock()
	defer v.mu.Unlock()
	return append([]reencryptLeft{}, v.list...)
}

// cost says what a run will do to etcd.
func (v *reencryptView) cost(p lifecycle.Result, members []*clientv3.StatusResponse) {
	if p.Rewritten == 0 {
		return
	}
	v.say("%d of %d values are to be rewritten: %d transactions, so many revisions, an event for each value to its watchers, and %s or more in etcd's database until it is compacted and defragmented",
		p.Rewritten, p.Keys, p.Transactions, size(p.Bytes))
	for _, m := range members {
		if m.DbSizeQuota > 0 && m.DbSize+p.Bytes > m.DbSizeQuota*8/10 {
			v.say("warning: member %x uses %s of its quota of %s: compact and defragment first, or raise --quota-backend-bytes", m.Header.MemberId, size(m.DbSize), size(m.DbSizeQuota))
		}
		for _, e := range m.Errors {
			v.say("warning: member %x reports %s", m.Header.MemberId, strings.TrimSpace(e))
		}
	}
}

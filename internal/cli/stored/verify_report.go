package stored

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/etcdfile"
)

// verifyReport is the result of verify.
type verifyReport struct {
	OK      bool            `json:"ok"`
	Values  int64           `json:"values"` // that were checked one by one
	Files   []etcdfile.File `json:"files"`
	Count   int64           `json:"findings"`
	Damaged int64           `json:"damaged"` // files that could not be decoded completely
	// values that look encrypted, and whose KMS does not respond
	Undecrypted int64              `json:"undecrypted"`
	Findings    []etcdfile.Finding `json:"list"` // the first maxFindings
	NotChecked  []string           `json:"notChecked"`
	// UndecryptedList has the first of the values that Undecrypted counts.
	UndecryptedList []etcdfile.Finding `json:"undecryptedList,omitempty"`

	undecided *undecided
	counts    map[reason]int64 // of both lists, and of what was beyond their limits
}

// reason is what the text of the report groups findings by.
type reason struct{ file, why string }

const (
	maxFindings  = 100_000
	textReasons  = 20 // of each file
	textExamples = 3  // of each reason
)

func newVerifyReport(d *undecided) *verifyReport {
	return &verifyReport{Files: []etcdfile.File{}, Findings: []etcdfile.Finding{}, undecided: d, counts: make(map[reason]int64)}
}

func (r *verifyReport) found(f etcdfile.Finding) {
	if !r.undecided.claim(f) {
		r.addFinding(f, 1)
	}
}

// addFinding adds a finding that stands for n.
func (r *verifyReport) addFinding(f etcdfile.Finding, n int64) {
	r.Count += n
	r.counts[reason{f.File, f.Why}] += n
	if len(r.Findings) < maxFindings {
		r.Findings = append(r.Findings, f)
	}
}

// addUndecrypted adds a value that was not decrypted and stands for n.
func (r *verifyReport) addUndecrypted(f etcdfile.Finding, n int64) {
	r.Undecrypted += n
	r.counts[reason{f.File, f.Why}] += n
	if len(r.UndecryptedList) < maxUndecrypted {
		r.UndecryptedList = append(r.UndecryptedList, f)
	}
}

// addFile adds the result of a file. alone says that it is the only one, which must have values for
// the report to mean anything.
func (r *verifyReport) addFile(f etcdfile.File, alone bool) {
	if alone && f.Kind == "other" && !f.Damaged {
		f.Notes, f.Damaged = append(f.Notes, "it is neither a database nor a write-ahead log: only its bytes were searched"), true
	}
	if alone && f.Kind != "other" && f.Kind != "database" && f.Kind != "log" && !f.Damaged {
		f.Notes, f.Damaged = append(f.Notes, "decompress it, and verify the result"), true
	}
	r.Values += f.Values
	r.Files = append(r.Files, f)
	if f.Damaged {
		r.Damaged++
		r.NotChecked = append(r.NotChecked, "what could not be decoded of "+f.Path+": "+strings.Join(f.Notes, "; "))
	}
}

// text prints the report for people.
func (r *verifyReport) text(w io.Writer, all bool) {
	if all {
		for _, f := range r.UndecryptedList {
			printable.Fprintf(w, "%s: %s %q was not decrypted: %s\n", f.File, f.Place, f.Key, f.Why)
		}
		for _, f := range r.Findings {
			printable.Fprintf(w, "%s: %s: %s\n", f.File, place(f), f.Why)
		}
	} else {
		r.textReasons(w, r.UndecryptedList, "value was not decrypted", "values were not decrypted")
		r.textReasons(w, r.Findings, "finding", "findings")
	}
	if len(r.Files) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		printable.Fprintf(t, "FILE\tKIND\tSIZE\tVALUES\tNOTES\n")
		for _, f := range r.Files {
			printable.Fprintf(t, "%s\t%s\t%s\t%d\t%s\n", f.Path, f.Kind, size(f.Bytes), f.Values, strings.Join(f.Notes, "; "))
		}
		_ = t.Flush()
	}
	printable.Fprintf(w, "%s checked, %s\nnot checked:\n", printable.Count(r.Values, "value was", "values were"), printable.Count(r.Count, "finding", "findings"))
	for _, u := range r.NotChecked {
		printable.Fprintf(w, "  - %s\n", u)
	}
}

// textReasons prints each reason with its count and a few examples. The nouns say what is counted.
func (r *verifyReport) textReasons(w io.Writer, findings []etcdfile.Finding, one, many string) {
	var order []reason
	examples := make(map[reason][]etcdfile.Finding)
	for _, f := range findings {
		why := reason{f.File, f.Why}
		if len(examples[why]) == 0 {
			order = append(order, why)
		}
		if len(examples[why]) < textExamples {
			examples[why] = append(examples[why], f)
		}
	}
	shown := make(map[string]int)
	for _, why := range order {
		if shown[why.file]++; shown[why.file] > textReasons {
			continue
		}
		n := r.counts[why]
		printable.Fprintf(w, "%s: %s: %s\n", why.file, printable.Count(n, one, many), why.why)
		for _, f := range examples[why] {
			printable.Fprintf(w, "  %s\n", place(f))
		}
		if more := n - int64(len(examples[why])); more > 0 {
			printable.Fprintf(w, "  and %d more, see --list\n", more)
		}
	}
	for _, file := range slices.Sorted(maps.Keys(shown)) {
		if more := shown[file] - textReasons; more > 0 {
			printable.Fprintf(w, "%s: %s, see --list\n", file, printable.Count(more, "more reason", "more reasons"))
		}
	}
}

// place returns where a finding is.
func place(f etcdfile.Finding) string {
	text := string(f.Place)
	if f.Key != "" {
		text += fmt.Sprintf(" %q", f.Key)
	}
	if f.Revision != 0 {
		text += fmt.Sprintf(" revision %d", f.Revision)
	}
	if f.Offset >= 0 {
		text += fmt.Sprintf(" byte %d", f.Offset)
	}
	return text
}

package stored

import (
	"context"
	"io"
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

	doubts *doubts
}

const (
	maxFindings  = 100_000
	textFindings = 20
)

func (r *verifyReport) found(f etcdfile.Finding) {
	if r.doubts.take(f) {
		return
	}
	r.Count++
	if len(r.Findings) < maxFindings {
		r.Findings = append(r.Findings, f)
	}
}

// decide turns the doubts into findings, or into values that count as not decrypted.
func (r *verifyReport) decide(ctx context.Context) {
	r.doubts.decide(ctx, func(f etcdfile.Finding, n int64) {
		r.Count += n
		if len(r.Findings) < maxFindings {
			r.Findings = append(r.Findings, f)
		}
	}, func(f etcdfile.Finding, n int64) {
		r.Undecrypted += n
		if len(r.UndecryptedList) < maxUndecrypted {
			r.UndecryptedList = append(r.UndecryptedList, f)
		}
	})
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
	for _, f := range r.UndecryptedList {
		printable.Fprintf(w, "%s: %s %q was not decrypted: %s\n", f.File, f.Place, f.Key, f.Why)
	}
	shown := make(map[string]int)
	for _, f := range r.Findings {
		shown[f.File]++
		if n := shown[f.File]; !all && n > textFindings {
			if n == textFindings+1 {
				printable.Fprintf(w, "%s: more, see --list\n", f.File)
			}
			continue
		}
		printable.Fprintf(w, "%s: %s", f.File, f.Place)
		if f.Key != "" {
			printable.Fprintf(w, " %q", f.Key)
		}
		if f.Revision != 0 {
			printable.Fprintf(w, " revision %d", f.Revision)
		}
		if f.Offset >= 0 {
			printable.Fprintf(w, " byte %d", f.Offset)
		}
		printable.Fprintf(w, ": %s\n", f.Why)
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

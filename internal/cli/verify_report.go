package cli

import (
	"context"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/etcdfile"
)

// verifyReport is what verify found.
type verifyReport struct {
	OK       bool               `json:"ok"`
	Values   int64              `json:"values"` // that were judged one by one
	Files    []etcdfile.File    `json:"files"`
	Count    int64              `json:"findings"`
	Damaged  int64              `json:"damaged"`  // files of which something was not decoded
	Unopened int64              `json:"unopened"` // values that look sealed, and whose KMS does not answer
	Findings []etcdfile.Finding `json:"list"`     // the first maxFindings
	Unseen   []string           `json:"notLookedAt"`
	// Unsure is the first of the values that are counted in Unopened.
	Unsure []etcdfile.Finding `json:"unopenedList,omitempty"`

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

// decide makes findings, or values that are counted as not decrypted, of what is in doubt.
func (r *verifyReport) decide(ctx context.Context) {
	r.doubts.decide(ctx, func(f etcdfile.Finding, n int64) {
		r.Count += n
		if len(r.Findings) < maxFindings {
			r.Findings = append(r.Findings, f)
		}
	}, func(f etcdfile.Finding, n int64) {
		r.Unopened += n
		if len(r.Unsure) < maxUnopened {
			r.Unsure = append(r.Unsure, f)
		}
	})
}

// looked takes up what a file was. alone is of the only one, which has to hold values for its report to mean anything.
func (r *verifyReport) looked(f etcdfile.File, alone bool) {
	if alone && f.Kind == "other" && !f.Damaged {
		f.Notes, f.Damaged = append(f.Notes, "it is neither a database nor a write-ahead log: its bytes were searched alone"), true
	}
	if alone && f.Kind != "other" && f.Kind != "database" && f.Kind != "log" && !f.Damaged {
		f.Notes, f.Damaged = append(f.Notes, "decompress it, and look at that"), true
	}
	r.Values += f.Values
	r.Files = append(r.Files, f)
	if f.Damaged {
		r.Damaged++
		r.Unseen = append(r.Unseen, "what could not be decoded of "+f.Path+": "+strings.Join(f.Notes, "; "))
	}
}

// text prints the report for people.
func (r *verifyReport) text(w io.Writer, all bool) {
	for _, f := range r.Unsure {
		printf(w, "%s: %s %q was not decrypted: %s\n", f.File, f.Place, f.Key, f.Why)
	}
	shown := make(map[string]int)
	for _, f := range r.Findings {
		shown[f.File]++
		if n := shown[f.File]; !all && n > textFindings {
			if n == textFindings+1 {
				printf(w, "%s: more, see --list\n", f.File)
			}
			continue
		}
		printf(w, "%s: %s", f.File, f.Place)
		if f.Key != "" {
			printf(w, " %q", f.Key)
		}
		if f.Revision != 0 {
			printf(w, " revision %d", f.Revision)
		}
		if f.Offset >= 0 {
			printf(w, " byte %d", f.Offset)
		}
		printf(w, ": %s\n", f.Why)
	}
	if len(r.Files) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		printf(t, "FILE\tKIND\tSIZE\tVALUES\tNOTES\n")
		for _, f := range r.Files {
			printf(t, "%s\t%s\t%s\t%d\t%s\n", f.Path, f.Kind, size(f.Bytes), f.Values, strings.Join(f.Notes, "; "))
		}
		_ = t.Flush()
	}
	printf(w, "%d values were judged, %d findings\nnot looked at:\n", r.Values, r.Count)
	for _, u := range r.Unseen {
		printf(w, "  - %s\n", u)
	}
}

// Package readiness has the report that /readyz returns: whether a process serves, and which of its
// parts do not work.
package readiness

import (
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
)

// Report is the state of a process.
type Report struct {
	// Ready is false only when nothing can be served. A rule that cannot serve is a check that is
	// not OK, in a report that is ready.
	Ready  bool
	Checks []Check
}

// Check is one line of a report, for example {"rule /registry/secrets/", false, "KMS ack is
// unavailable"}. It never holds a value or a key's bytes.
type Check struct {
	Name   string
	OK     bool
	Detail string
}

// String returns the report as text, in the form that Kubernetes' components use. Each check is one
// printable line, because operators read it on a terminal.
func (r Report) String() string {
	var b strings.Builder
	for _, c := range r.Checks {
		mark, detail := "[+]", " ok"
		if !c.OK {
			mark, detail = "[-]", " failed"
		}
		if c.Detail != "" {
			detail = ": " + strings.ReplaceAll(c.Detail, "\n", "; ") // between joined errors
		}
		printable.Fprintf(&b, "%s%s%s\n", mark, c.Name, detail)
	}
	result := "failed"
	if r.Ready {
		result = "passed"
	}
	printable.Fprintf(&b, "readyz check %s\n", result)
	return b.String()
}

// Failed returns the lines of the failed checks in the text of a report.
func Failed(report string) (lines []string) {
	for line := range strings.Lines(report) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "[-]") {
			lines = append(lines, line)
		}
	}
	return lines
}

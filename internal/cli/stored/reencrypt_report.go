package stored

import (
	"io"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
)

// reencryptReport is the result of reencrypt.
type reencryptReport struct {
	OK          bool `json:"ok"`
	DryRun      bool `json:"dryRun,omitempty"`
	Interrupted bool `json:"interrupted,omitempty"`
	reencrypt.Result
	Seconds float64 `json:"seconds"`
	// partial is set if the run ended before it had examined all keys
	partial bool
}

// text prints the report for people.
func (r *reencryptReport) text(w io.Writer) {
	for _, l := range r.Skipped {
		printable.Fprintf(w, "left\t%s: %s\n", printable.Name(l.Key), l.Why)
	}
	if n := r.Unfinished() - int64(len(r.Skipped)); n > 0 {
		printable.Fprintf(w, "left\tand %d more\n", n)
	}
	verb := "rewritten"
	if r.DryRun {
		verb = "to rewrite"
	}
	left := printable.Sprintf("%d left", r.Unfinished())
	if r.partial {
		left = "and it is not known how many are left"
	}
	printable.Fprintf(w, "%s: %d %s in %s, %d already current, a concurrent write won %s, %s; revisions %d to %d, %.1f s\n",
		printable.Count(r.Keys, "key", "keys"), r.Rewritten, verb, printable.Count(r.Transactions, "transaction", "transactions"), r.Current,
		printable.Count(r.Raced, "time", "times"), left, r.Revisions.First, r.Revisions.Last, r.Seconds)
	if r.Rewritten > r.Decrypted && !r.DryRun { // after decryption there is nothing to purge
		printable.Fprintf(w, "the old values are still in etcd's history and files: see purge\n")
	}
}

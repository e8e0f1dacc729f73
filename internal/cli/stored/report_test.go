package stored

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
)

// TestReportsQuote: whatever the strings of a report hold, its text is printable.
func TestReportsQuote(t *testing.T) {
	status, rewritten, purge, verify, value := new(statusReport), new(reencryptReport), new(purgeReport), new(verifyReport), new(decryptedValue)
	clitest.CheckReport(t, "status", status, status.text)
	clitest.CheckReport(t, "reencrypt", rewritten, rewritten.text)
	clitest.CheckReport(t, "purge", purge, purge.text)
	clitest.CheckReport(t, "purge plan", purge, purge.plan)
	for _, all := range []bool{false, true} {
		clitest.CheckReport(t, "verify", verify, func(w io.Writer) { verify.text(w, all) })
	}
	clitest.CheckReport(t, "value", value, func(w io.Writer) { _ = value.print(io.Discard, w, false) })
	planned := new(reencrypt.Result)
	clitest.CheckReport(t, "view", planned, func(w io.Writer) {
		v := newReencryptView(w)
		v.printLine("waiting: another reencrypt is at work (%s)", clitest.Hostile)
		v.paused(clitest.Hostile, clitest.Hostile)
		v.showCost(*planned, nil)
	})
}

// TestReencryptReport checks what is said about the values that are left, and when purge is named.
func TestReencryptReport(t *testing.T) {
	t.Parallel()
	const purge, unknown = "see purge", "it is not known how many are left"
	for name, test := range map[string]struct {
		rewritten, decrypted int64
		dry                  bool
		err                  error
		said, not            []string
	}{
		"encrypted":     {rewritten: 2, said: []string{purge, ", 0 left;"}, not: []string{unknown}},
		"decrypted":     {rewritten: 2, decrypted: 2, said: []string{", 0 left;"}, not: []string{purge, unknown}},
		"some of each":  {rewritten: 2, decrypted: 1, said: []string{purge}, not: []string{unknown}},
		"dry run":       {rewritten: 2, dry: true, said: []string{", 0 left;"}, not: []string{purge, unknown}},
		"ended early":   {rewritten: 2, err: context.Canceled, said: []string{purge, unknown}, not: []string{"0 left"}},
		"nothing to do": {said: []string{", 0 left;"}, not: []string{purge, unknown}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			job := &reencryption{options: reencryptOptions{dryRun: test.dry}}
			done := reencrypt.Result{Progress: reencrypt.Progress{Keys: 3, Rewritten: test.rewritten, Decrypted: test.decrypted}}
			report, _ := job.report(t.Context(), done, test.err) // the error is of the command
			var out strings.Builder
			report.text(&out)
			for _, s := range test.said {
				if !strings.Contains(out.String(), s) {
					t.Errorf("no %q in %s", s, out.String())
				}
			}
			for _, s := range test.not {
				if strings.Contains(out.String(), s) {
					t.Errorf("%q in %s", s, out.String())
				}
			}
		})
	}
}

// TestReasonsAreBelowTables: a long reason does not make a table wide.
func TestReasonsAreBelowTables(t *testing.T) {
	t.Parallel()
	const reason = "the KMS is unreachable, throttling or failing: there is no socket"
	status := &statusReport{KMS: []statusKMS{{Name: "down", Reason: reason}, {Name: "gone", Revoked: true, Reason: reason, KeyID: "1"}, {Name: "up", OK: true, KeyID: "1"}}}
	drill := &drillReport{Left: []drillKey{{Name: "down", Reason: reason}, {Name: "up", OK: true, KeyID: "1"}}}
	for want, report := range map[string]func(io.Writer){
		"down  does not respond     none\ngone  key may not be used  1\nup    ok                   1\ndown: " + reason + "\ngone: " + reason + "\n": status.text,
		"down  cannot be used  none\nup    not needed      1\ndown: " + reason + "\n":                                                               drill.text,
	} {
		var out bytes.Buffer
		if report(&out); !strings.Contains(out.String(), want) {
			t.Errorf("no %q in %s", want, &out)
		}
	}
}

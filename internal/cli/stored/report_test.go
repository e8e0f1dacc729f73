package stored

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// TestReportsQuote: whatever the strings of a report hold, its text is printable.
func TestReportsQuote(t *testing.T) {
	status, reencrypt, purge, verify, value := new(statusReport), new(reencryptReport), new(purgeReport), new(verifyReport), new(decryptedValue)
	clitest.CheckReport(t, "status", status, status.text)
	clitest.CheckReport(t, "reencrypt", reencrypt, reencrypt.text)
	clitest.CheckReport(t, "purge", purge, purge.text)
	clitest.CheckReport(t, "purge plan", purge, purge.plan)
	for _, all := range []bool{false, true} {
		clitest.CheckReport(t, "verify", verify, func(w io.Writer) { verify.text(w, all) })
	}
	clitest.CheckReport(t, "value", value, func(w io.Writer) { _ = value.print(io.Discard, w, false) })
	planned := new(reencrypt.Result)
	clitest.CheckReport(t, "view", planned, func(w io.Writer) {
		v := newReencryptView(w)
		v.say("waiting: another reencrypt is at work (%s)", clitest.Hostile)
		v.paused(clitest.Hostile, clitest.Hostile)
		v.cost(*planned, nil)
	})
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

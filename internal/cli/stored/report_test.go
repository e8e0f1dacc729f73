package stored

import (
	"io"
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

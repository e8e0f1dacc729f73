package cli

import (
	"io"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/age"
)

// offlineKind is the kind of providers that only wrap recovery copies.
const offlineKind = "age"

// tryOffline wraps a key for the recipients, and unwraps it if there are identities.
func (r *providerReport) tryOffline(key *provider.AgeKey, ids *age.Identities) {
	if ids != nil {
		key.SetIdentities(ids)
	}
	r.KeyID, r.Recipients = key.ID(), key.Recipients().Names()
	tested, err := key.Test()
	r.addTried("encrypt")
	if tested || err != nil && ids != nil {
		r.addTried("decrypt")
	}
	if err != nil {
		r.addFinding("%v", err)
	}
	r.OK = len(r.Findings) == 0
}

// textOffline prints what is special about such a provider.
func (r *providerReport) textOffline(w io.Writer) {
	tested := "not tested with an identity: use --identity"
	switch {
	case len(r.Tried) > 1:
		tested = "an identity unwrapped a recovery copy"
	case !r.LastTested.IsZero():
		tested = "last with an identity at " + r.LastTested.Format(time.RFC3339)
	}
	printable.Fprintf(w, "  recipients  %d, %s\n  tested      %s\n", len(r.Recipients), printable.Name(r.KeyID), tested)
}

// addLastTests adds to the reports of offline keys when each was tested last.
func addLastTests(c *config.Config, stderr io.Writer, reports []providerReport) {
	for i := range reports {
		if r := &reports[i]; r.Backend == offlineKind && r.OK {
			r.LastTested = command.LastTest(c, stderr, r.Name, r.KeyID)
			if len(r.Tried) > 1 && r.LastTested.IsZero() { // without an audit log
				r.LastTested = time.Now().UTC()
			}
		}
	}
}

// recordTests records which offline keys were tested with an identity, so that the audit log says
// when each was tested last.
func recordTests(c *config.Config, stderr io.Writer, reports []providerReport, identities bool) error {
	for _, r := range reports {
		if r.Backend != offlineKind || !identities {
			continue
		}
		record := auditlog.Record{Command: "kms check", Provider: r.Name, KeyID: r.KeyID, Outcome: "ok", Reason: "an identity unwrapped a recovery copy"}
		if !r.OK {
			record.Outcome, record.Reason = "failed", r.Findings[0]
		}
		if err := command.Record(c, stderr, record); err != nil {
			return err
		}
	}
	return nil
}

package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// ring returns the ring of a provider, or nil.
func (a *app) ring(name string) *keyring.Ring {
	for _, r := range a.rings {
		if r.Provider() == name {
			return r
		}
	}
	return nil
}

// setRecovery tells each ring who wraps copies of its seeds. Rules of the same provider have the same recovery, which config checks; newRules
// has found all of their rings.
func (a *app) setRecovery(rules []config.Rule) error {
	for _, ring := range a.rings {
		var by []*keyring.Ring
		required := false
		for _, r := range rules {
			if r.WriteWith != ring.Provider() {
				continue
			}
			for _, name := range r.Recovery {
				by = append(by, a.ring(name))
			}
			required = r.RecoveryRequired
			break
		}
		if err := ring.SetRecovery(by, required); err != nil {
			return err
		}
	}
	a.metrics.expectRecoveries(a, rules)
	return nil
}

// recoveryNotice is how long after it happened readyz says that a recovery copy was used.
const recoveryNotice = time.Hour

// recoveryChecks reports for each provider and the providers that copy its seeds whether the copies are made, and whether they are in use.
func (a *app) recoveryChecks(now time.Time) []proxy.Check {
	var checks []proxy.Check
	for _, r := range a.rings {
		for _, s := range r.Recovery() {
			var problems []string
			if !s.Used.IsZero() && now.Sub(s.Used) < recoveryNotice {
				problems = append(problems, "in use: values were opened by their recovery copies, last at "+s.Used.UTC().Format(time.RFC3339))
			}
			switch {
			case s.Lacking != "" && s.Required:
				problems = append(problems, "no value is sealed without it: "+s.Lacking)
			case s.Lacking != "":
				problems = append(problems, "values are sealed without it: "+s.Lacking)
			}
			checks = append(checks, proxy.Check{
				Name: fmt.Sprintf("recovery of %s by %s", r.Provider(), s.Provider), OK: len(problems) == 0, Detail: strings.Join(problems, "; "),
			})
		}
	}
	return checks
}

package encryption

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
)

// recoveryNotice is how long /readyz shows that a recovery copy was used.
const recoveryNotice = time.Hour

// setRecovery gives a ring the rings that wrap copies of its DEK seeds. Rules that write with the
// same provider have the same recovery providers, which config checks. mu is held.
func (k *Keys) setRecovery(ring *keyring.Ring, rules []config.Rule) error {
	i := slices.IndexFunc(rules, func(r config.Rule) bool { return r.WriteWith == ring.Provider() })
	if i < 0 {
		return ring.SetRecovery(nil, false)
	}
	var by []*keyring.Ring
	for _, name := range rules[i].Recovery {
		by = append(by, k.ring(name))
	}
	return ring.SetRecovery(by, rules[i].RecoveryRequired)
}

// ProviderChecks returns the lines of the readiness report about the providers, their files and
// their recovery copies.
func (k *Keys) ProviderChecks() []readiness.Check {
	var checks []readiness.Check
	for _, r := range k.rings {
		s := r.State()
		checks = append(checks, readiness.Check{Name: "kms " + s.Provider, OK: s.Healthy, Detail: s.Reason})
	}
	for _, f := range k.files {
		checks = append(checks, FileCheck(f.name, f.check()))
	}
	now := time.Now()
	for _, r := range k.rings {
		for _, s := range r.Recovery() {
			var problems []string
			if !s.Used.IsZero() && now.Sub(s.Used) < recoveryNotice {
				problems = append(problems, "in use: values were decrypted by their recovery copies, last at "+s.Used.UTC().Format(time.RFC3339))
			}
			switch {
			case s.Lacking != "" && s.Required:
				problems = append(problems, "no value is encrypted without it: "+s.Lacking)
			case s.Lacking != "":
				problems = append(problems, "values are encrypted without it: "+s.Lacking)
			}
			checks = append(checks, readiness.Check{
				Name: fmt.Sprintf("recovery of %s by %s", r.Provider(), s.Provider), OK: len(problems) == 0, Detail: strings.Join(problems, "; "),
			})
		}
	}
	return checks
}

// FileCheck is the line of the readiness report about files. err is why the newest are not in use.
func FileCheck(name string, err error) readiness.Check {
	if err != nil {
		return readiness.Check{Name: name, Detail: "the old one stays in use: " + err.Error()}
	}
	return readiness.Check{Name: name, OK: true}
}

// RuleChecks returns the lines of the readiness report about the rules.
func (k *Keys) RuleChecks() []readiness.Check {
	var checks []readiness.Check
	set := k.Rules()
	for i, s := range set.sealers {
		check := readiness.Check{Name: fmt.Sprintf("rule %q", set.config[i].Prefix), OK: true}
		if err := cmp.Or(k.Audit.Refusal(), s.Health()); err != nil {
			check.OK, check.Detail = false, err.Error()
		}
		checks = append(checks, check)
	}
	return checks
}

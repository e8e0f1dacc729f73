package rule

import "github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"

// Outcome is the result of a Seal or an Open of a value.
type Outcome string

// The outcomes. Those of failures are spelled like their [keyring.Kind].
const (
	OutcomeOK        Outcome = "ok"        // encrypted, or decrypted
	OutcomePlaintext Outcome = "plaintext" // stored, or returned, as plaintext
	// OutcomeForeign: returned as stored: of a provider that the rule does not read
	OutcomeForeign Outcome = "foreign"
	// OutcomePassthrough: returned as stored although it is corrupt, by the rule's policy
	OutcomePassthrough Outcome = "passthrough"
	OutcomeUnavailable Outcome = "unavailable"
	OutcomeSeedRefused Outcome = "seed_refused"
	OutcomeKeyUnusable Outcome = "key_unusable"
	OutcomeCorrupt     Outcome = "corrupt"
	OutcomeStrict      Outcome = "strict"  // refused: plaintext or foreign under a strict rule
	OutcomeRefused     Outcome = "refused" // not written; see [keyring.Refused]
)

// Observer counts values. Its methods are called on the data path, concurrently: they must be quick
// and must not block.
type Observer interface {
	// Sealed is called for each value that is written under the rule of this prefix.
	Sealed(rule string, outcome Outcome)
	// Opened is called for each stored value that is read under the rule of this prefix.
	Opened(rule string, outcome Outcome)
}

// silent is the Observer of a config without one.
type silent struct{}

func (silent) Sealed(string, Outcome) {}
func (silent) Opened(string, Outcome) {}

func outcomeOf(err *keyring.Error) Outcome {
	switch err.Kind {
	case keyring.Plaintext:
		return OutcomeStrict
	default:
		return Outcome(err.Kind.String())
	}
}

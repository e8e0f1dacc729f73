package keyring

// Outcome is how a Seal or an Open of a value ended.
type Outcome string

// The outcomes. Those of failures are spelled like their [Kind].
const (
	OutcomeOK          Outcome = "ok"          // sealed, or opened
	OutcomePlaintext   Outcome = "plaintext"   // stored, or handed on, as plaintext
	OutcomeForeign     Outcome = "foreign"     // handed on as stored: sealed by someone else
	OutcomePassthrough Outcome = "passthrough" // handed on as stored although it is corrupt, by the rule's policy
	OutcomeUnavailable Outcome = "unavailable"
	OutcomeSeedRefused Outcome = "seed_refused"
	OutcomeKeyUnusable Outcome = "key_unusable"
	OutcomeCorrupt     Outcome = "corrupt"
	OutcomeStrict      Outcome = "strict"  // refused: plaintext or foreign under a strict rule
	OutcomeRefused     Outcome = "refused" // not written; see [Refused]
)

// Event is something that happened to a ring's seeds.
type Event string

// The events.
const (
	EventHit     Event = "hit"     // a cached seed was used
	EventMiss    Event = "miss"    // a seed had to be unwrapped, by this caller or another one at the same time
	EventStale   Event = "stale"   // a seed past its TTL was used because the KMS does not answer
	EventMinted  Event = "minted"  // a seed was minted
	EventRevoked Event = "revoked" // seeds were dropped because their key may not be used
	EventGood    Event = "good"    // a contact was good, after New or after one that was not
	EventBad     Event = "bad"     // a contact was not good, after New or after one that was
)

// Observer is told what happens, to count and to log it. Its methods are called on the data path, concurrently: they must be quick
// and must not block.
type Observer interface {
	// Sealed is called for each value sealed under the rule of this prefix.
	Sealed(rule string, outcome Outcome)
	// Opened is called for each stored value opened under the rule of this prefix.
	Opened(rule string, outcome Outcome)
	// Seed is called for each event of a provider's seeds.
	Seed(provider string, event Event)
	// Recovered is called for each value of a provider that was opened with a seed from a recovery copy, beside Opened.
	Recovered(provider, by string)
	// Rescued is called once for each seed of a provider that the KMS of by unwrapped from its recovery copy, under keyID, and before a value is
	// opened with it. why is what the provider's own KMS did instead; it is safe to show.
	Rescued(provider, by, keyID, why string)
}

// silent is the Observer of a config without one.
type silent struct{}

func (silent) Sealed(string, Outcome)    {}
func (silent) Opened(string, Outcome)    {}
func (silent) Seed(string, Event)        {}
func (silent) Recovered(string, string)  {}
func (silent) Rescued(_, _, _, _ string) {}

func outcomeOf(err *Error) Outcome {
	switch err.Kind {
	case Plaintext:
		return OutcomeStrict
	default:
		return Outcome(err.Kind.String())
	}
}

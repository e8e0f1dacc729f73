package keyring

// Event is an event of a ring's DEK seeds.
type Event string

// The events.
const (
	EventHit Event = "hit" // a cached seed was used
	// EventMiss: a seed had to be unwrapped, by this caller or another one at the same time
	EventMiss Event = "miss"
	// EventStale: a seed past its TTL was used because the KMS does not answer
	EventStale     Event = "stale"
	EventGenerated Event = "generated" // a seed was generated
	EventRevoked   Event = "revoked"   // seeds were evicted because their key may not be used
	// EventGood: the first good health check, at the start or after a failed one
	EventGood Event = "good"
	// EventBad: the first failed health check, at the start or after a good one
	EventBad Event = "bad"
)

// Observer counts and logs what happens. Its methods are called on the data path, concurrently:
// they must be quick and must not block.
type Observer interface {
	// Seed is called for each event of a provider's seeds.
	Seed(provider string, event Event)
	// Recovered is called for each value of a provider that was decrypted with a seed from a
	// recovery copy.
	Recovered(provider, by string)
	// CopyUnwrapped is called once for each seed of a provider that the KMS of by unwrapped from
	// its recovery copy, under keyID, before a value is decrypted with it. why is how the
	// provider's own KMS failed; it is safe to show.
	CopyUnwrapped(provider, by, keyID, why string)
}

// silent is the Observer of a config without one.
type silent struct{}

func (silent) Seed(string, Event)              {}
func (silent) Recovered(string, string)        {}
func (silent) CopyUnwrapped(_, _, _, _ string) {}

// Package keyring manages the DEK seeds of KMS providers: it generates them, encrypts values with
// the current one, unwraps and caches those of stored values, rotates when the KMS names a new key
// ID, and evicts them when the key may not be used any more.
//
// A [Ring] is one KMS provider, and a [Cache] holds the unwrapped seeds of all rings. crypto/rule
// decides which ring encrypts a value; the stored bytes are those of crypto/envelope; calls,
// retries and the circuit breaker are those of kmsclient. The package knows nothing of etcd's API,
// of the configuration or of metrics' names. docs/glossary.md explains the terms.
//
// # Parts of a ring
//
//	Ring        encrypts values with the seed in use, and passes values to decrypt to seeds (ring.go)
//	monitor     health checks: Status, rotation, revocation, probes of old keys (monitor.go, probe.go, package settling)
//	generator   generates and verifies DEK seeds (generator.go)
//	seeds       finds a value's seed in the cache or by the KMS, and decrypts (seeds.go, unwrap.go, cache.go, package hottable)
//	copyWriter  has recovery copies of new seeds wrapped (recovery_write.go)
//	copyReader  unwraps recovery copies of stored values (recovery_read.go)
//	OfflineKey  wraps and unwraps copies for rings that have no KMS (offline.go)
//	refusals    seeds that the KMS refuses, and when it may be called for them again (refusals.go)
//	caller      the KMS calls (calls.go)
//	provider    what the parts share: configuration, texts, the published state (provider.go)
//
// # States and events
//
// The state of the provider (type state) decides whether values are encrypted and decrypted:
//
//	state        event that leads to it                        encrypts                 decrypts
//	pending      New; a required recovery copy is missing      waits                    cached seeds, KMS calls
//	healthy      a good health check                           yes                      yes
//	unhealthy    Status says so, but the key works             yes                      yes
//	failing      a failed health check                         for SealUnreachableFor   cached seeds, KMS calls, copies
//	alias lost   the configured alias leads to no key          no                       cached seeds, KMS calls, copies
//	denied       the KMS refuses the caller                    as failing               as failing, for RevokeWithin
//	disabled     the key is disabled, or denied for longer     no                       no
//	gone         the key is deleted or will be                 no                       recovery copies
//
// A good health check ends each of them. It calls Status, generates a seed if one is due (key ID,
// MaxAge, MaxSeals, recovery copies), and has the KMS unwrap the seed in use, since a KMS may
// answer Status although the key may not be used.
//
// A seed in the cache (type entry) has these states:
//
//	state        event that leads to it                        next use
//	unverified   the KMS unwrapped it                          decrypts; if it fails, the KMS unwraps it again
//	verified     it decrypted a value, or was generated here   decrypts
//	stale        its TTL is over                               the KMS unwraps it; without an answer it decrypts for
//	                                                           ServeUnreachableFor
//	expired      that is over too                              the KMS unwraps it
//	evicted      its key was revoked, or the cache is full     the KMS unwraps it
//
// A seed that the KMS does not unwrap (type refusal) is refused for 5 seconds, then for longer,
// without a KMS call.
//
// What the KMS says about the key of a stored value applies to the seeds of that key ID alone, and
// has the current key checked at once: a stored value can name any key, and must not take the
// provider down. Each health check also unwraps one cached seed of every other key, so that the
// revocation of an old key is noticed.
package keyring

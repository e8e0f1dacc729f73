// Package keyring is the life of seeds: it mints them, seals under the current one, unwraps and caches those of stored values, rotates on a
// new key ID, and drops them when the KMS says that the key may not be used any more.
//
// A [Ring] stands for one KMS provider, a [Cache] holds unwrapped seeds of all rings within one bound, a [Sealer] is one rule of the
// proxy: which ring writes, which may be read, and what happens to a value that is none of theirs. The bytes are crypto/envelope's;
// calls, retries and the circuit breaker are kmsclient's. The package knows nothing of etcd's API, of configuration or of metrics' names: the
// command composes it, and the proxy calls a Sealer through an interface of its own.
//
// # When the KMS is silent
//
// Values are sealed under the ring's current seed until RingConfig.SealUnreachableFor after the last good contact; a good contact is a
// Status that says ok, the minting of a new seed where one was due, and the unwrapping of the one in use. Values are opened with cached
// seeds: until CacheConfig.TTL without asking, and for CacheConfig.ServeUnreachableFor more while the KMS does not answer. Everything else
// is [Unavailable].
//
// # When the KMS says no
//
// A KMS may answer Status and not let the key be used, or not look at the key for it: so each contact has the seed in use unwrapped as well,
// and nothing is sealed under a seed before that was done once. An answer that the key is disabled, pending deletion or gone revokes at
// once: the provider's seeds are dropped, sealing and opening fail with [KeyUnusable]. A refusal of the caller (credentials, permission) does the same once it has lasted for
// RingConfig.RevokeWithin. Both end with the first good contact. That an alias leads to no key ends sealing alone: each key that
// values name is asked about by unwrapping. Where a value names a key other than the current one, such an answer
// to its Decrypt drops the seeds of that key ID only, and has the current key checked at once: what a stored value claims cannot take
// the provider down. Each poll also unwraps one cached seed of every other key again (of 32 keys at most, then it goes on with the others), so
// that an old key's revocation is noticed as well.
//
// # Memory
//
// Dropping a seed means dropping every reference to it. Go offers no way to wipe what the runtime and the ciphers may have
// copied, so a dump of the process' memory can hold seeds that are no longer in use.
package keyring

package keyring

import (
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// MaxProbes is how many keys one health check probes.
const MaxProbes = maxProbes

// SetKMS replaces the KMS of a ring that does not run.
func (r *Ring) SetKMS(kms kmsclient.Service) { r.p.cfg.KMS = kms }

// EvictAll evicts all seeds of the ring.
func (r *Ring) EvictAll() { r.seeds.evict(func(*entry) bool { return true }) }

// RecoverySetting identifies the setting of SetRecovery: another one is another value.
func (r *Ring) RecoverySetting() any { return r.copier.set.Load() }

// HasHot reports whether the fast path finds the seed of an object, and uses it.
func (r *Ring) HasHot(object []byte) bool {
	_, rest, cut := envelope.Cut(object)
	e := r.seeds.hot.Get(rest)
	if !cut || e == nil {
		return false
	}
	old := time.Since(e.fetched)
	if r.p.cfg.Cache.ageAfter(e, old) != fresh {
		return false
	}
	r.p.cfg.Cache.touch(e, old)
	return true
}

// Ciphers returns how many ciphers of values are cached.
func (r *Ring) Ciphers() int { return r.seeds.recent.Expire(0) }

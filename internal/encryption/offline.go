package encryption

import (
	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
)

// addOffline makes the ring of a provider that only wraps recovery copies. It has no KMS, so that
// nothing of it is polled, counted or described.
func (k *Keys) addOffline(p config.KMS, key *provider.AgeKey, cache *keyring.Cache) error {
	if k.Identities != nil {
		key.SetIdentities(k.Identities)
	}
	ring, err := keyring.New(keyring.RingConfig{
		Provider: p.Name, Offline: key, Cache: cache, Observer: k.metrics.forProvider(p.Name), Logger: k.Logger,
	})
	if err != nil {
		return err
	}
	k.offline = append(k.offline, ring)
	if file := p.Age.RecipientsFile; file != "" {
		seen := filewatch.Digest(file)
		if err := key.Reload(); err != nil { // it may have changed before its digest was taken
			return err
		}
		k.followFile(&followedFile{
			provider: p.Name, path: file, name: "recipients file of " + p.Name, seen: seen,
			good: "recipients file reloaded", bad: "changed recipients file cannot be used; the old recipients stay in use",
			load: func() ([]any, error) {
				if err := key.Reload(); err != nil {
					return nil, err
				}
				ring.Check()
				k.CheckNow() // each ring generates a DEK seed with a copy for the new recipients
				return []any{"recipients", key.ID()}, nil
			},
		})
	}
	return nil
}

package encryption

import (
	"context"

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
		k.files = append(k.files, fileCheck{"recipients file of " + p.Name, key.CheckFiles})
		k.runs = append(k.runs, func(ctx context.Context) {
			filewatch.Watch(ctx, file, seen, func() { k.reloadRecipients(ring, key, file) })
		})
	}
	return nil
}

// reloadRecipients uses the recipients of a changed file: the next poll of each ring generates a
// DEK seed with a copy for them.
func (k *Keys) reloadRecipients(ring *keyring.Ring, key *provider.AgeKey, file string) {
	if err := key.Reload(); err != nil {
		k.Logger.Error("changed recipients file cannot be used; the old recipients stay in use", "provider", ring.Provider(), "error", err)
		return
	}
	k.Logger.Info("recipients file reloaded", "provider", ring.Provider(), "file", file, "recipients", key.ID())
	ring.Check()
	k.CheckNow()
}

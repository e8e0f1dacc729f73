package cli

import (
	"context"
	"crypto/sha256"
	"log/slog"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// keyFile is the file of a local provider's keys.
type keyFile struct {
	path string
	seen [sha256.Size]byte // digest of the file before its keys were first used
	ring *keyring.Ring
}

// watch checks the provider at once when the file's content has changed, so that a new key is used
// from then on, until ctx ends.
func (f keyFile) watch(ctx context.Context, log *slog.Logger) {
	watchFile(ctx, f.path, f.seen, log, "the key file is not watched: a change counts at the next poll, or with SIGHUP", func() {
		log.Info("key file has changed", "provider", f.ring.Provider(), "file", f.path)
		f.ring.Check()
	})
}

// checkKeys checks every KMS ahead of its next poll.
func (a *app) checkKeys() {
	for _, ring := range a.rings {
		ring.Check()
	}
}

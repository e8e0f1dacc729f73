package encryption

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
)

// fileCheckInterval is the time between two checks of files that are otherwise read on demand.
const fileCheckInterval = time.Second

// fileCheck is a set of files that are read again when they change, with a line in /readyz.
type fileCheck struct {
	name  string       // of the line
	check func() error // reads the files if they changed, and returns why the newest are not in use
}

// watchFiles checks the files until ctx ends, so that a bad file is logged before it is needed.
func (k *Keys) watchFiles(ctx context.Context) {
	ticker := time.NewTicker(fileCheckInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, f := range k.files {
				_ = f.check() // which logs it
			}
		}
	}
}

// watchKeyFile returns a function that polls a local provider at once when its key file changes, so
// that a new key is used from then on.
func watchKeyFile(path string, seen [sha256.Size]byte, ring *keyring.Ring, log *slog.Logger) func(context.Context) {
	return func(ctx context.Context) {
		filewatch.Watch(ctx, path, seen, func() {
			log.Info("key file has changed", "provider", ring.Provider(), "file", path)
			ring.Check()
		})
	}
}

// readerFile follows the key file of a provider of kind kubernetes.
type readerFile struct {
	provider config.KMS
	seen     [sha256.Size]byte // digest of the file before its keys were first used
	keys     *Keys

	mu      sync.Mutex
	problem error // why the newest file is not in use
}

func (f *readerFile) check() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problem
}

// watch reloads the keys when the file changes, until ctx ends.
func (f *readerFile) watch(ctx context.Context) {
	filewatch.Watch(ctx, f.provider.Kubernetes.KeyFile, f.seen, f.reload)
}

// reload replaces the reader by one with the keys of the newest file, in all rules.
func (f *readerFile) reload() {
	err := f.keys.reloadReader(f.provider)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.problem = err
	if err != nil {
		f.keys.Logger.Error("changed key file cannot be used; the old keys stay in use", "provider", f.provider.Name, "error", err)
		return
	}
	f.keys.Logger.Info("key file reloaded", "provider", f.provider.Name, "file", f.provider.Kubernetes.KeyFile)
}

// reloadReader reads the keys of p again. On an error the old ones stay.
func (k *Keys) reloadReader(p config.KMS) error {
	b, err := provider.New(p, k.Logger)
	if err != nil {
		return err
	}
	if b.Reader == nil {
		return errors.New("the provider has no keys to decrypt with")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	old := k.readers[p.Name]
	k.readers[p.Name] = b.Reader
	if err := k.setRules(k.current.Load().config); err != nil {
		k.readers[p.Name] = old
		return err
	}
	return nil
}

package encryption

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/periodic"
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
	periodic.Run(ctx, fileCheckInterval, func() {
		for _, f := range k.files {
			_ = f.check() // which logs it
		}
	})
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

// followedFile is a file whose keys are loaded again when it changes. While the new ones cannot be
// used, the old ones stay in use.
type followedFile struct {
	provider, path string
	name           string            // of its line in /readyz
	good, bad      string            // what the log says of new keys that are used, or cannot be
	seen           [sha256.Size]byte // digest of the file before its keys were first used
	load           func() (attrs []any, err error)

	problem atomic.Pointer[error] // why the newest file is not in use; nil before the first change
}

// followFile follows a file from [Keys.Run] on.
func (k *Keys) followFile(f *followedFile) {
	k.files = append(k.files, fileCheck{f.name, func() error {
		if err := f.problem.Load(); err != nil {
			return *err
		}
		return nil
	}})
	k.runs = append(k.runs, func(ctx context.Context) {
		filewatch.Watch(ctx, f.path, f.seen, func() {
			attrs, err := f.load()
			f.problem.Store(&err)
			if err != nil {
				k.Logger.Error(f.bad, "provider", f.provider, "error", err)
				return
			}
			k.Logger.Info(f.good, append([]any{"provider", f.provider, "file", f.path}, attrs...)...)
		})
	})
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

package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/livefiles"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// lookEvery is how often files are looked at that are read when they are needed.
const lookEvery = time.Second

// liveFile is a file, or a few, that are read again while the proxy runs, with a line in /readyz.
type liveFile struct {
	name  string       // of the check
	check func() error // why the newest is not in use; it looks
}

// watchLive looks at the files until ctx ends, so that a bad one is in the log before it is needed.
func (a *app) watchLive(ctx context.Context) {
	if len(a.live) == 0 {
		return
	}
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, f := range a.live {
				_ = f.check() // it logs
			}
		}
	}
}

// liveChecks are the lines of the readiness report about these files.
func (a *app) liveChecks() []proxy.Check {
	var checks []proxy.Check
	for _, f := range a.live {
		c := proxy.Check{Name: f.name, OK: true}
		if err := f.check(); err != nil {
			c.OK, c.Detail = false, "the old one stays in use: "+err.Error()
		}
		checks = append(checks, c)
	}
	return checks
}

// newPassword reads the password of the proxy's user of etcd. White space at its end does not count.
func newPassword(path string, log *slog.Logger) (*livefiles.Files[string], error) {
	files, err := livefiles.New(livefiles.Config{Paths: []string{path}, What: "etcd.passwordFile", Logger: log}, func(c livefiles.Contents) (string, error) {
		password := strings.TrimRight(string(c[path]), " \t\r\n")
		if password == "" {
			return "", fmt.Errorf("%s holds no password", path)
		}
		return password, nil
	})
	if err != nil {
		return nil, fmt.Errorf("etcd.passwordFile: %w", err)
	}
	return files, nil
}

// kubernetesKeys follows the key file of a provider of kind kubernetes.
type kubernetesKeys struct {
	provider config.KMS

	mu      sync.Mutex
	problem error // why the newest file is not in use
}

// check says why the newest file is not in use.
func (k *kubernetesKeys) check() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.problem
}

// reload puts readers with the keys of the newest file in the place of the old ones, in all rules.
func (k *kubernetesKeys) reload(r *reloader) {
	path := k.provider.Kubernetes.KeyFile
	b, err := newKubernetes(k.provider.Kubernetes)
	if err == nil {
		err = r.setReader(k.provider.Name, b)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.problem = err
	if err != nil {
		r.log.Error("changed key file cannot be used; the old keys stay in use", "provider", k.provider.Name, "error", err)
		return
	}
	r.log.Info("key file reloaded", "provider", k.provider.Name, "file", path)
}

// watch reloads the keys when the file's content has changed, until ctx ends.
func (k *kubernetesKeys) watch(ctx context.Context, r *reloader) {
	path := k.provider.Kubernetes.KeyFile
	watchFile(ctx, path, digest(path), r.log, "the key file is not watched: a change needs a restart", func() { k.reload(r) })
}

// setReader has the rules read with another reader of one provider. On an error the old one stays.
func (r *reloader) setReader(name string, b *backend) error {
	if b.reader == nil {
		return errors.New("the provider has no keys to read with")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.app.readers[name]
	r.app.readers[name] = b.reader
	if err := r.app.setRules(r.running.Rules); err != nil {
		r.app.readers[name] = old
		return err
	}
	return nil
}

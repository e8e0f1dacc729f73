// Package etcdclient makes etcd clients from the configuration, for requests of the proxy's own and
// for commands. It refuses endpoints that lead to another proxy.
package etcdclient

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// ErrChained says that etcd.endpoints leads to a proxy.
var ErrChained = problem.New("name etcd itself under etcd.endpoints", "etcd.endpoints leads to a proxy, which would encrypt and decrypt values too")

// Password is the content of etcd.passwordFile, which may change.
type Password = filewatch.Files[string]

// New makes a client. It connects to nothing yet. The password is nil if the configuration has no
// user.
func New(c *config.Config, log *slog.Logger) (*clientv3.Client, *Password, error) {
	u, password := Upstream(&c.Etcd), (*Password)(nil)
	if c.Etcd.Username != "" {
		var err error
		if password, err = newPassword(c.Etcd.PasswordFile, log); err != nil {
			return nil, nil, err
		}
		u.Username, u.Password = c.Etcd.Username, password.Get
	}
	client, err := upstream.NewClient(u, log)
	return client, password, err
}

// newPassword reads the password of etcd's user. White space at its end is ignored.
func newPassword(path string, log *slog.Logger) (*Password, error) {
	files, err := filewatch.New(filewatch.Config{Paths: []string{path}, What: "etcd.passwordFile", Logger: log}, func(c filewatch.Contents) (string, error) {
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

// Upstream returns where etcd is, as the proxy takes it.
func Upstream(e *config.Etcd) proxy.UpstreamConfig {
	return proxy.UpstreamConfig{Endpoints: e.Endpoints, HTTPEndpoints: e.HTTPEndpoints, TLS: (*proxy.UpstreamTLS)(e.TLS)}
}

// CheckNotProxy returns [ErrChained] if an endpoint leads to a proxy, also through a server between
// them that removes the mark of a proxy's requests. It is no error if etcd does not respond.
func CheckNotProxy(ctx context.Context, c *config.Config, log *slog.Logger) error {
	endpoint, err := upstream.FindProxy(ctx, Upstream(&c.Etcd), log)
	if err == nil && endpoint != "" {
		return ErrChained
	}
	return err
}

// Self names this process where one of several is elected.
func Self() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	return fmt.Sprintf("%s, process %d", host, os.Getpid())
}

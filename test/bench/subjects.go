package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// The subjects. The relay is the least that any proxy costs, grpc-proxy what etcd itself offers.
const (
	direct    = "direct"
	layer4    = "l4"
	grpcProxy = "grpc-proxy"
	passing   = "passing" // etcd-kms-proxy without a rule for the keys
	sealing   = "sealing" // etcd-kms-proxy with a rule and a local key
)

var subjectNames = []string{direct, layer4, grpcProxy, passing, sealing}

// Keys below sealedPrefix are under the sealing proxy's rule; the others are plaintext to all.
const (
	plainPrefix  = "/plain/"
	sealedPrefix = "/sealed/"
)

// subject is a way to etcd.
type subject struct {
	name     string
	endpoint string
	prefix   string   // of the keys to use
	process  *process // nil for etcd itself
}

// bed is etcd with the subjects before it.
type bed struct {
	cfg      config
	dir      string
	etcd     *process
	subjects []*subject
	direct   *clientv3.Client
	started  []*process
}

// newBed starts all processes. The caller must close the bed.
func newBed(ctx context.Context, cfg config) (*bed, error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, fmt.Errorf("make temporary folder: %w", err)
	}
	b := &bed{cfg: cfg, dir: dir}
	if err := b.start(ctx); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *bed) close() {
	if b.direct != nil {
		b.direct.Close()
	}
	for _, p := range slices.Backward(b.started) {
		p.stop()
	}
	_ = os.RemoveAll(b.dir) // a folder that stays behind in /tmp is not worth an error
}

func (b *bed) start(ctx context.Context) error {
	address, err := freeAddress()
	if err != nil {
		return err
	}
	peer, err := freeAddress()
	if err != nil {
		return err
	}
	b.etcd, err = b.spawn("etcd-3.7", "--name", "bench", "--data-dir", filepath.Join(b.dir, "data"), "--log-level", "error",
		"--listen-client-urls", "http://"+address, "--advertise-client-urls", "http://"+address,
		"--listen-peer-urls", "http://"+peer, "--initial-advertise-peer-urls", "http://"+peer, "--initial-cluster", "bench=http://"+peer,
		"--unsafe-no-fsync", "--quota-backend-bytes", fmt.Sprint(8<<30))
	if err != nil {
		return err
	}
	if b.direct, err = dial(address); err != nil {
		return err
	}
	if err := b.etcd.ready(ctx, b.answers(b.direct)); err != nil {
		return err
	}
	for _, name := range b.cfg.Subjects {
		s := &subject{name: name, endpoint: address, prefix: plainPrefix}
		if name == sealing {
			s.prefix = sealedPrefix
		}
		if name != direct {
			if err := b.startSubject(ctx, s, address); err != nil {
				return err
			}
		}
		b.subjects = append(b.subjects, s)
	}
	return nil
}

func (b *bed) startSubject(ctx context.Context, s *subject, upstream string) (err error) {
	if s.endpoint, err = freeAddress(); err != nil {
		return err
	}
	switch s.name {
	case layer4:
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find this program: %w", err)
		}
		if s.process, err = start(b.dir, s.name, []string{relayListen + "=" + s.endpoint, relayUpstream + "=" + upstream}, self); err != nil {
			return err
		}
		b.started = append(b.started, s.process)
	case grpcProxy:
		s.process, err = b.spawn("etcd-3.7", "grpc-proxy", "start", "--endpoints", "http://"+upstream, "--listen-addr", s.endpoint,
			"--advertise-client-url", s.endpoint, "--data-dir", filepath.Join(b.dir, "grpc-proxy"))
	case passing, sealing:
		var path string
		if path, err = b.proxyConfig(s, upstream); err != nil {
			return err
		}
		s.process, err = b.spawn("etcd-kms-proxy", "serve", "--config", path)
	}
	if err != nil {
		return err
	}
	c, err := dial(s.endpoint)
	if err != nil {
		return err
	}
	defer c.Close()
	return s.process.ready(ctx, b.answers(c))
}

// spawn starts a binary that the Makefile builds.
func (b *bed) spawn(binary string, args ...string) (*process, error) {
	path, err := filepath.Abs(filepath.Join(b.cfg.BinDir, binary))
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", binary, err)
	}
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("find %s: %w; run `make build tools-etcd` first", binary, err)
	}
	p, err := start(b.dir, fmt.Sprintf("%d-%s", len(b.started), binary), nil, path, args...)
	if err != nil {
		return nil, err
	}
	b.started = append(b.started, p)
	return p, nil
}

// proxyConfig writes the configuration of an etcd-kms-proxy. The one without a rule for the keys at hand still has one for others, as a
// cluster would that seals its Secrets only.
func (b *bed) proxyConfig(s *subject, upstream string) (string, error) {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // does not fail: crypto/rand ends the process instead
	keyFile := filepath.Join(b.dir, s.name+"-key.yaml")
	if err := os.WriteFile(keyFile, fmt.Appendf(nil, "keys:\n- id: \"1\"\n  secret: %s\n", base64.StdEncoding.EncodeToString(secret)), 0o600); err != nil {
		return "", fmt.Errorf("write key file: %w", err)
	}
	path := filepath.Join(b.dir, s.name+".yaml")
	err := os.WriteFile(path, fmt.Appendf(nil, `apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
- address: %s
etcd:
  endpoints: [http://%s]
kms:
- name: bench
  local: {keyFile: %s}
rules:
- prefix: %s
  writeWith: bench
  allowPlaintextReads: false
coordination: {enabled: false} # what the clients cost alone
log: {level: warn}
`, s.endpoint, upstream, keyFile, sealedPrefix), 0o600)
	if err != nil {
		return "", fmt.Errorf("write configuration: %w", err)
	}
	return path, nil
}

// answers returns a check that a subject leads to the etcd of this run, which nothing else has marked.
func (b *bed) answers(c *clientv3.Client) func(context.Context) error {
	return func(ctx context.Context) error {
		if _, err := b.direct.Put(ctx, "mark", b.dir); err != nil {
			return err
		}
		mark, err := c.Get(ctx, "mark")
		if err != nil {
			return err
		}
		if len(mark.Kvs) != 1 || string(mark.Kvs[0].Value) != b.dir {
			return errors.New("another etcd answers")
		}
		return nil
	}
}

// dial makes a client of one connection.
func dial(address string) (*clientv3.Client, error) {
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{address}, DialTimeout: 10 * time.Second, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithDisableRetry()},
	})
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	return c, nil
}

package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// The subjects. The relay is the least that any proxy costs, grpc-proxy what etcd itself offers.
const (
	direct         = "direct"
	layer4         = "l4"
	haproxy        = "haproxy" // in TCP mode
	grpcProxy      = "grpc-proxy"
	passing        = "passing"    // etcd-kms-proxy without a rule for the keys
	encrypting     = "encrypting" // etcd-kms-proxy with a rule and a local key
	basePassing    = "base-passing"
	baseEncrypting = "base-encrypting"
)

var subjectNames = []string{direct, layer4, haproxy, grpcProxy, passing, encrypting}

// Keys below encryptedPrefix are under the rule of an encrypting proxy; the others are plaintext to
// all subjects.
const (
	plainPrefix     = "/plain/"
	encryptedPrefix = "/encrypted/"
)

// subject is a way to etcd.
type subject struct {
	name     string
	endpoint string
	admin    string   // address of the proxy's metrics; "" if it has none
	prefix   string   // of the keys to use
	process  *process // nil for etcd itself
	tls      *tls.Config
}

// encrypts reports whether the values that a subject stores are encrypted.
func encrypts(name string) bool { return name == encrypting || name == baseEncrypting }

// bed is one etcd with the subjects in front of it, all over one transport.
type bed struct {
	cfg      config
	dir      string
	pki      *pki // nil without TLS
	keyFile  string
	etcd     *process
	subjects []*subject
	direct   *clientv3.Client
	started  []*process
}

// newBed starts all processes. The caller must close the bed.
func newBed(ctx context.Context, cfg config, secure bool) (*bed, error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, fmt.Errorf("make temporary folder: %w", err)
	}
	b := &bed{cfg: cfg, dir: dir}
	if secure {
		b.pki, err = newPKI(dir)
	}
	if err == nil {
		err = b.start(ctx)
	}
	if err != nil {
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

func (b *bed) scheme() string {
	if b.pki != nil {
		return "https"
	}
	return "http"
}

func (b *bed) clientTLS() *tls.Config {
	if b.pki == nil {
		return nil
	}
	return b.pki.client
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
	url := b.scheme() + "://" + address
	args := []string{"--name", "bench", "--data-dir", filepath.Join(b.dir, "data"), "--log-level", "error",
		"--listen-client-urls", url, "--advertise-client-urls", url,
		"--listen-peer-urls", "http://" + peer, "--initial-advertise-peer-urls", "http://" + peer,
		"--initial-cluster", "bench=http://" + peer, "--max-concurrent-streams", "20000",
		"--unsafe-no-fsync", "--quota-backend-bytes", fmt.Sprint(8 << 30)}
	if b.pki != nil {
		args = append(args, "--cert-file", b.pki.certFile, "--key-file", b.pki.keyFile,
			"--trusted-ca-file", b.pki.caFile, "--client-cert-auth")
	}
	if b.etcd, err = b.spawn(filepath.Join(b.cfg.BinDir, "etcd-3.7"), args...); err != nil {
		return err
	}
	if b.direct, err = dial(address, b.clientTLS()); err != nil {
		return err
	}
	if err := b.etcd.ready(ctx, b.answers(b.direct)); err != nil {
		return err
	}
	for _, name := range b.cfg.Subjects {
		s := &subject{name: name, endpoint: address, prefix: plainPrefix, tls: b.clientTLS()}
		if encrypts(name) {
			s.prefix = encryptedPrefix
		}
		if name != direct {
			if err := b.startSubject(ctx, s, address); err != nil {
				return err
			}
		}
		b.subjects = append(b.subjects, s)
	}
	for range b.cfg.Busy {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find this program: %w", err)
		}
		p, err := start(b.dir, fmt.Sprintf("%d-busy", len(b.started)), []string{benchBurn + "=1"}, self)
		if err != nil {
			return err
		}
		b.started = append(b.started, p)
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
		env := []string{relayListen + "=" + s.endpoint, relayUpstream + "=" + upstream}
		if s.process, err = start(b.dir, s.name, env, self); err != nil {
			return err
		}
		b.started = append(b.started, s.process)
	case haproxy:
		s.process, err = b.haproxy(s.endpoint, upstream)
	case grpcProxy:
		args := []string{"grpc-proxy", "start", "--endpoints", b.scheme() + "://" + upstream,
			"--listen-addr", s.endpoint, "--advertise-client-url", s.endpoint,
			"--data-dir", filepath.Join(b.dir, "grpc-proxy")}
		if b.pki != nil {
			args = append(args, "--cert", b.pki.clientCertFile, "--key", b.pki.clientKeyFile, "--cacert", b.pki.caFile,
				"--cert-file", b.pki.certFile, "--key-file", b.pki.keyFile, "--trusted-ca-file", b.pki.caFile)
		}
		s.process, err = b.spawn(filepath.Join(b.cfg.BinDir, "etcd-3.7"), args...)
	default:
		binary := filepath.Join(b.cfg.BinDir, "etcd-kms-proxy")
		if s.name == basePassing || s.name == baseEncrypting {
			binary = b.cfg.Base
		}
		var path string
		if path, err = b.proxyConfig(s, upstream); err != nil {
			return err
		}
		s.process, err = b.spawn(binary, "serve", "--config", path)
	}
	if err != nil {
		return err
	}
	c, err := dial(s.endpoint, s.tls)
	if err != nil {
		return err
	}
	defer c.Close()
	return s.process.ready(ctx, b.answers(c))
}

// haproxy starts haproxy as a TCP proxy.
func (b *bed) haproxy(listen, upstream string) (*process, error) {
	binary, err := exec.LookPath(haproxy)
	if err != nil {
		return nil, fmt.Errorf("find haproxy: %w", err)
	}
	path := filepath.Join(b.dir, "haproxy.cfg")
	err = os.WriteFile(path, fmt.Appendf(nil, `defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
listen etcd
  bind %s
  server etcd %s
`, listen, upstream), 0o600)
	if err != nil {
		return nil, fmt.Errorf("write configuration of haproxy: %w", err)
	}
	return b.spawn(binary, "-db", "-f", path)
}

// spawn starts a binary.
func (b *bed) spawn(binary string, args ...string) (*process, error) {
	path, err := filepath.Abs(binary)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", binary, err)
	}
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("find %s: %w; run `make build tools-etcd` first", binary, err)
	}
	name := fmt.Sprintf("%d-%s", len(b.started), filepath.Base(binary))
	var env []string
	if b.cfg.Profile != "" {
		env = []string{"PROFILE_DIR=" + b.cfg.Profile}
	}
	p, err := start(b.dir, name, env, path, args...)
	if err != nil {
		return nil, err
	}
	b.started = append(b.started, p)
	return p, nil
}

// proxyConfig writes the configuration of an etcd-kms-proxy. The one without a rule for the keys at
// hand still has one for others, like a cluster that encrypts its Secrets only. All proxies have
// one key, so that one can read what another has written.
func (b *bed) proxyConfig(s *subject, upstream string) (string, error) {
	if b.keyFile == "" {
		secret := make([]byte, 32)
		_, _ = rand.Read(secret) // does not fail: crypto/rand ends the process instead
		b.keyFile = filepath.Join(b.dir, "key.yaml")
		key := fmt.Appendf(nil, "keys:\n- id: \"1\"\n  secret: %s\n", base64.StdEncoding.EncodeToString(secret))
		if err := os.WriteFile(b.keyFile, key, 0o600); err != nil {
			return "", fmt.Errorf("write key file: %w", err)
		}
	}
	var err error
	if s.admin, err = freeAddress(); err != nil {
		return "", err
	}
	listenerTLS, etcdTLS := "", ""
	if b.pki != nil {
		listenerTLS = fmt.Sprintf("\n  tls: {certFile: %s, keyFile: %s, clientCAFile: %s}", b.pki.certFile, b.pki.keyFile, b.pki.caFile)
		etcdTLS = fmt.Sprintf("\n  tls: {caFile: %s, certFile: %s, keyFile: %s}", b.pki.caFile, b.pki.clientCertFile, b.pki.clientKeyFile)
	}
	text := strings.NewReplacer("LISTEN", s.endpoint, "ADMIN", s.admin, "ETCD", b.scheme()+"://"+upstream, "KEYFILE", b.keyFile,
		"PREFIX", encryptedPrefix, "\nLISTENERTLS", listenerTLS, "\nETCDTLS", etcdTLS).Replace(`apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
- address: LISTEN
LISTENERTLS
etcd:
  endpoints: [ETCD]
ETCDTLS
kms:
- name: bench
  local: {keyFile: KEYFILE}
rules:
- prefix: PREFIX
  writeWith: bench
  allowPlaintextReads: false
coordination: {enabled: false} # what the clients cost alone
admin: {address: ADMIN}
log: {level: warn}
`)
	path := filepath.Join(b.dir, s.name+".yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return "", fmt.Errorf("write configuration: %w", err)
	}
	return path, nil
}

// answers returns a check that a subject leads to the etcd of this run, which nothing else has
// marked.
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
			return errors.New("another etcd responds")
		}
		return nil
	}
}

// dial makes a client of one connection.
func dial(address string, secure *tls.Config) (*clientv3.Client, error) {
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{address}, DialTimeout: 10 * time.Second, Logger: zap.NewNop(), TLS: secure,
		DialOptions:        []grpc.DialOption{grpc.WithDisableRetry()},
		MaxCallRecvMsgSize: 1 << 30,
	})
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	return c, nil
}

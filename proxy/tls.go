package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// ListenerTLS is the TLS side of a listener. The files are read again when they change: new connections get the new ones, all
// of them together or none. Open connections end within seconds if their client certificate would be refused now, because it was revoked, its CA is gone or it has expired.
type ListenerTLS struct {
	CertFile, KeyFile string   // PEM; the certificate with its intermediates
	ClientCAFile      string   // PEM; with it every client must show a certificate of one of these CAs
	ClientCRLFile     string   // PEM or DER; revoked client certificates; every list must be signed by a CA of ClientCAFile
	MinVersion        string   // "1.2" (the default) or "1.3"
	CipherSuites      []string // Go's names, for TLS 1.2; empty: Go's choice
}

// UpstreamTLS is the TLS side of the connection to etcd. The files are read again when they change.
type UpstreamTLS struct {
	CAFile             string // PEM; empty: the system's CAs
	CertFile, KeyFile  string // PEM; the client certificate, both or neither
	ServerName         string // empty: each endpoint is verified against its own host
	InsecureSkipVerify bool   // take any server certificate
}

// The names of HTTP's versions in TLS.
const (
	protocolHTTP1 = "http/1.1"
	protocolHTTP2 = "h2"
)

// fresh hands out what load made of files, and makes it anew when one of them has changed. When that fails the last good one stays.
// It is safe for concurrent use.
type fresh[T any] struct {
	paths []string
	load  func() (T, error)
	log   *slog.Logger
	what  string // for the log

	mu    sync.Mutex
	stamp string
	value T
}

// newFresh loads for the first time.
func newFresh[T any](log *slog.Logger, what string, paths []string, load func() (T, error)) (*fresh[T], error) {
	f := &fresh[T]{paths: paths, load: load, log: log, what: what, stamp: stamp(paths)}
	var err error
	if f.value, err = load(); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *fresh[T]) get() T {
	now := stamp(f.paths)
	f.mu.Lock()
	defer f.mu.Unlock()
	if now == f.stamp {
		return f.value
	}
	// Taken before the files are read, the stamp makes a change in between show at the next call.
	f.stamp = now
	value, err := f.load()
	if err != nil {
		f.log.Error("changed TLS files cannot be used; the old ones stay in use", "for", f.what, "error", err)
		return f.value
	}
	f.log.Info("TLS files reloaded", "for", f.what)
	f.value = value
	return value
}

// stamp changes whenever one of the files is replaced or written.
func stamp(paths []string) string {
	var b strings.Builder
	for _, p := range paths {
		if p == "" {
			continue
		}
		info, err := os.Stat(p) //nolint:gosec // the operator names the file
		if err != nil {
			b.WriteString("missing;")
			continue
		}
		fmt.Fprintf(&b, "%d %d;", info.ModTime().UnixNano(), info.Size())
	}
	return b.String()
}

// serverTLS loads a listener's files.
func (c *ListenerTLS) serverTLS(log *slog.Logger, address string) (*fresh[*tls.Config], error) {
	version, err := tlsVersion(c.MinVersion)
	if err != nil {
		return nil, err
	}
	suites, err := cipherSuites(c.CipherSuites)
	if err != nil {
		return nil, err
	}
	if c.ClientCRLFile != "" && c.ClientCAFile == "" {
		return nil, errors.New("clientCRLFile: needs clientCAFile")
	}
	paths := []string{c.CertFile, c.KeyFile, c.ClientCAFile, c.ClientCRLFile}
	return newFresh(log, "listener "+address, paths, func() (*tls.Config, error) {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("load certificate %s with key %s: %w", c.CertFile, c.KeyFile, err)
		}
		cfg := &tls.Config{
			Certificates: []tls.Certificate{cert},
			MinVersion:   version,
			CipherSuites: suites,
			NextProtos:   []string{protocolHTTP2, protocolHTTP1}, // in this order, as etcd
		}
		if c.ClientCAFile == "" {
			return cfg, nil
		}
		pool, cas, err := loadCAs(c.ClientCAFile)
		if err != nil {
			return nil, err
		}
		cfg.ClientCAs, cfg.ClientAuth = pool, tls.RequireAndVerifyClientCert
		if c.ClientCRLFile == "" {
			return cfg, nil
		}
		revoked, err := loadCRL(c.ClientCRLFile, cas, log)
		if err != nil {
			return nil, err
		}
		cfg.VerifyConnection = func(cs tls.ConnectionState) error { return revoked.check(cs.VerifiedChains) }
		return cfg, nil
	})
}

func tlsVersion(s string) (uint16, error) {
	switch s {
	case "", "1.2":
		return tls.VersionTLS12, nil
	case "1.3":
		return tls.VersionTLS13, nil
	}
	return 0, fmt.Errorf("minVersion %q: must be 1.2 or 1.3", s)
}

func cipherSuites(names []string) ([]uint16, error) {
	var ids []uint16
	for _, name := range names {
		id := uint16(0)
		for _, s := range tls.CipherSuites() {
			if s.Name == name {
				id = s.ID
			}
		}
		if id == 0 {
			return nil, fmt.Errorf("cipherSuites: %q is not a suite that is known and secure", name)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func loadCAs(path string) (*x509.CertPool, []*x509.Certificate, error) {
	data, err := os.ReadFile(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, nil, fmt.Errorf("read CA certificates: %w", err)
	}
	pool := x509.NewCertPool()
	var cas []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, fmt.Errorf("parse CA certificates %s: %w", path, err)
		}
		pool.AddCert(cert)
		cas = append(cas, cert)
	}
	if len(cas) == 0 {
		return nil, nil, fmt.Errorf("parse CA certificates %s: there is no certificate in it", path)
	}
	return pool, cas, nil
}

// revocations holds revoked certificates as issuer and serial number.
type revocations map[string]bool

func loadCRL(path string, cas []*x509.Certificate, log *slog.Logger) (revocations, error) {
	data, err := os.ReadFile(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("read revocation list: %w", err)
	}
	var lists [][]byte
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "X509 CRL" {
			lists = append(lists, block.Bytes)
		}
	}
	if len(lists) == 0 {
		lists = [][]byte{data}
	}
	revoked := make(revocations)
	for _, der := range lists {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, fmt.Errorf("parse revocation list %s: %w", path, err)
		}
		signed := false
		for _, ca := range cas {
			signed = signed || list.CheckSignatureFrom(ca) == nil
		}
		if !signed {
			return nil, fmt.Errorf("verify revocation list %s: no CA of clientCAFile has signed it", path)
		}
		if !list.NextUpdate.IsZero() && time.Now().After(list.NextUpdate) {
			log.Warn("the revocation list is out of date; it stays in use", "file", path, "nextUpdate", list.NextUpdate)
		}
		for _, entry := range list.RevokedCertificateEntries {
			revoked[string(list.RawIssuer)+entry.SerialNumber.String()] = true
		}
	}
	return revoked, nil
}

// check passes if one of the chains holds no revoked certificate.
func (r revocations) check(chains [][]*x509.Certificate) error {
	for _, chain := range chains {
		clean := true
		for _, cert := range chain {
			clean = clean && !r[string(cert.RawIssuer)+cert.SerialNumber.String()]
		}
		if clean {
			return nil
		}
	}
	return errors.New("client certificate is revoked")
}

// upstreamCredentials makes each connection to etcd with the files of the moment.
type upstreamCredentials struct {
	files *fresh[*tls.Config]
}

var _ credentials.TransportCredentials = (*upstreamCredentials)(nil)

func (c *UpstreamTLS) credentials(log *slog.Logger) (*upstreamCredentials, error) {
	if (c.CertFile == "") != (c.KeyFile == "") {
		return nil, errors.New("certFile and keyFile: one needs the other")
	}
	files, err := newFresh(log, "etcd", []string{c.CAFile, c.CertFile, c.KeyFile}, func() (*tls.Config, error) {
		cfg := &tls.Config{
			MinVersion:         tls.VersionTLS12,
			ServerName:         c.ServerName,
			InsecureSkipVerify: c.InsecureSkipVerify, //nolint:gosec // spelled out by the operator
		}
		if c.CAFile != "" {
			pool, _, err := loadCAs(c.CAFile)
			if err != nil {
				return nil, err
			}
			cfg.RootCAs = pool
		}
		if c.CertFile != "" {
			cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("load certificate %s with key %s: %w", c.CertFile, c.KeyFile, err)
			}
			cfg.Certificates = []tls.Certificate{cert}
		}
		return cfg, nil
	})
	if err != nil {
		return nil, err
	}
	return &upstreamCredentials{files: files}, nil
}

// config is what the files of the moment make. Without a server name, each endpoint is verified against its own host.
func (c *upstreamCredentials) config() *tls.Config { return c.files.get() }

// ClientHandshake implements credentials.TransportCredentials. authority is the endpoint's own host.
func (c *upstreamCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg := c.config()
	if cfg.ServerName != "" {
		authority = cfg.ServerName
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
}

// ServerHandshake implements credentials.TransportCredentials; these credentials are a client's.
func (c *upstreamCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server handshake with a client's credentials")
}

// Info implements credentials.TransportCredentials.
func (c *upstreamCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (c *upstreamCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials; the name is the configuration's to say.
func (c *upstreamCredentials) OverrideServerName(string) error {
	return errors.New("override server name: not supported")
}

// commonName is that of the client certificate, if there is one.
func (c *upstreamCredentials) commonName() string {
	if c == nil {
		return ""
	}
	certs := c.config().Certificates
	if len(certs) == 0 || certs[0].Leaf == nil {
		return ""
	}
	return certs[0].Leaf.Subject.CommonName
}

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
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
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

// serverTLS loads a listener's files.
func (c *ListenerTLS) serverTLS(log *slog.Logger, address string) (*tlsFiles, error) {
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
	files := filewatch.Config{Paths: []string{c.CertFile, c.KeyFile, c.ClientCAFile, c.ClientCRLFile}, What: "listener " + address, Logger: log}
	return newTLSFiles(files, func(data filewatch.Contents) (*tls.Config, []certificate, error) {
		cert, err := keyPair(data, c.CertFile, c.KeyFile)
		if err != nil {
			return nil, nil, err
		}
		held := []certificate{chainExpiry(useListener, cert)}
		cfg := &tls.Config{
			Certificates: []tls.Certificate{cert},
			MinVersion:   version,
			CipherSuites: suites,
			NextProtos:   []string{protocolHTTP2, protocolHTTP1}, // in this order, as etcd
		}
		if c.ClientCAFile == "" {
			return cfg, held, nil
		}
		pool, cas, err := parseCAs(c.ClientCAFile, data[c.ClientCAFile])
		if err != nil {
			return nil, nil, err
		}
		held = append(held, caExpiry(useListenerClientCA, cas))
		cfg.ClientCAs, cfg.ClientAuth = pool, tls.RequireAndVerifyClientCert
		if c.ClientCRLFile == "" {
			return cfg, held, nil
		}
		revoked, err := parseCRL(c.ClientCRLFile, data[c.ClientCRLFile], cas, log)
		if err != nil {
			return nil, nil, err
		}
		cfg.VerifyConnection = func(cs tls.ConnectionState) error { return revoked.check(cs.VerifiedChains) }
		return cfg, held, nil
	})
}

// heldTLS is a TLS configuration and when the certificates in it expire.
type heldTLS struct {
	config       *tls.Config
	certificates []certificate
}

// tlsFiles are a TLS configuration that is kept up to date with its files. It is safe for
// concurrent use.
type tlsFiles struct{ *filewatch.Files[heldTLS] }

// newTLSFiles loads for the first time.
func newTLSFiles(cfg filewatch.Config, load func(filewatch.Contents) (*tls.Config, []certificate, error)) (*tlsFiles, error) {
	files, err := filewatch.New(cfg, func(data filewatch.Contents) (held heldTLS, err error) {
		held.config, held.certificates, err = load(data)
		return held, err
	})
	if err != nil {
		return nil, fmt.Errorf("load TLS files: %w", err)
	}
	return &tlsFiles{files}, nil
}

// Get returns the configuration of the files as they are now, or of the last ones that could be
// used. It is the same pointer as long as these are the same.
func (f *tlsFiles) Get() *tls.Config { return f.Files.Get().config }

// certificates returns the certificates of the files that are in use.
func (f *tlsFiles) certificates() []certificate { return f.Files.Get().certificates }

// keyPair makes a certificate of its files.
func keyPair(data filewatch.Contents, certFile, keyFile string) (tls.Certificate, error) {
	cert, err := tls.X509KeyPair(data[certFile], data[keyFile])
	if err == nil {
		err = filewatch.CompletePEM(certFile, data[certFile])
	}
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("load certificate %s with key %s: %w", certFile, keyFile, err)
	}
	return cert, nil
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

func parseCAs(path string, data []byte) (*x509.CertPool, []*x509.Certificate, error) {
	if err := filewatch.CompletePEM(path, data); err != nil {
		return nil, nil, fmt.Errorf("parse CA certificates: %w", err)
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

func parseCRL(path string, data []byte, cas []*x509.Certificate, log *slog.Logger) (revocations, error) {
	var lists [][]byte
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "X509 CRL" {
			lists = append(lists, block.Bytes)
		}
	}
	if len(lists) == 0 {
		lists = [][]byte{data}
	} else if err := filewatch.CompletePEM(path, data); err != nil {
		return nil, fmt.Errorf("parse revocation list: %w", err)
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
	files *tlsFiles
}

var _ credentials.TransportCredentials = (*upstreamCredentials)(nil)

func (c *UpstreamTLS) credentials(log *slog.Logger) (*upstreamCredentials, error) {
	if (c.CertFile == "") != (c.KeyFile == "") {
		return nil, errors.New("certFile and keyFile: one needs the other")
	}
	live := filewatch.Config{Paths: []string{c.CAFile, c.CertFile, c.KeyFile}, What: "etcd", Logger: log}
	files, err := newTLSFiles(live, func(data filewatch.Contents) (*tls.Config, []certificate, error) {
		var held []certificate
		cfg := &tls.Config{
			MinVersion:         tls.VersionTLS12,
			ServerName:         c.ServerName,
			InsecureSkipVerify: c.InsecureSkipVerify, //nolint:gosec // spelled out by the operator
		}
		if c.CAFile != "" {
			pool, cas, err := parseCAs(c.CAFile, data[c.CAFile])
			if err != nil {
				return nil, nil, err
			}
			cfg.RootCAs = pool
			held = append(held, caExpiry(useEtcdCA, cas))
		}
		if c.CertFile != "" {
			cert, err := keyPair(data, c.CertFile, c.KeyFile)
			if err != nil {
				return nil, nil, err
			}
			cfg.Certificates = []tls.Certificate{cert}
			held = append(held, chainExpiry(useEtcdClient, cert))
		}
		return cfg, held, nil
	})
	if err != nil {
		return nil, err
	}
	return &upstreamCredentials{files: files}, nil
}

// config is what the files of the moment make. Without a server name, each endpoint is verified against its own host.
func (c *upstreamCredentials) config() *tls.Config { return c.files.Get() }

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

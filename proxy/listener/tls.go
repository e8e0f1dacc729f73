package listener

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/tlsutil"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
)

// TLS is the TLS side of a listener. The files are read again when they change: new connections get
// the new ones, all of them together or none. Open connections end within seconds if their client
// certificate would be refused now, because it was revoked, its CA is gone or it has expired.
type TLS struct {
	CertFile, KeyFile string // PEM; the certificate with its intermediates
	// PEM; with it every client must show a certificate of one of these CAs
	ClientCAFile string
	// PEM or DER; revoked client certificates; every list must be signed by a CA of ClientCAFile
	ClientCRLFile string
	MinVersion    string   // "1.2" (the default) or "1.3"
	CipherSuites  []string // for TLS 1.2, by the names that etcd takes; empty: Go's choice
}

// serverTLS loads a listener's files.
func (c *TLS) serverTLS(log *slog.Logger, address string) (*tlsfiles.Files, error) {
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
	return tlsfiles.New(files, func(data filewatch.Contents) (*tls.Config, []tlsfiles.Certificate, error) {
		cert, err := tlsfiles.KeyPair(data, c.CertFile, c.KeyFile)
		if err != nil {
			return nil, nil, err
		}
		held := []tlsfiles.Certificate{tlsfiles.ChainExpiry(tlsfiles.UseListener, cert)}
		cfg := &tls.Config{
			Certificates: []tls.Certificate{cert},
			MinVersion:   version,
			CipherSuites: suites,
			// in this order, as etcd
			NextProtos: []string{tlsfiles.ProtocolHTTP2, tlsfiles.ProtocolHTTP1},
		}
		if c.ClientCAFile == "" {
			return cfg, held, nil
		}
		pool, cas, err := tlsfiles.ParseCAs(c.ClientCAFile, data[c.ClientCAFile])
		if err != nil {
			return nil, nil, err
		}
		held = append(held, tlsfiles.CaExpiry(tlsfiles.UseListenerClientCA, cas))
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
		id, _ := tlsutil.GetCipherSuite(name)
		if !slices.ContainsFunc(tls.CipherSuites(), func(s *tls.CipherSuite) bool { return s.ID == id }) {
			return nil, fmt.Errorf("cipherSuites: %q is not a suite that is known and secure", name)
		}
		ids = append(ids, id)
	}
	return ids, nil
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

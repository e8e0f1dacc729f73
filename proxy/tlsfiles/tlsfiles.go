// Package tlsfiles reads certificates, keys, CAs and revocation lists from files, reads them again
// when they change, and says when the certificates in them expire. Listeners and connections to
// etcd use it.
package tlsfiles

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
)

// The names of HTTP's versions in TLS.
const (
	ProtocolHTTP1 = "http/1.1"
	ProtocolHTTP2 = "h2"
)

// heldTLS is a TLS configuration and when the certificates in it expire.
type heldTLS struct {
	config       *tls.Config
	certificates []Certificate
}

// Files are a TLS configuration that is kept up to date with its files. It is safe for
// concurrent use.
type Files struct{ *filewatch.Files[heldTLS] }

// New loads for the first time.
func New(cfg filewatch.Config, load func(filewatch.Contents) (*tls.Config, []Certificate, error)) (*Files, error) {
	files, err := filewatch.New(cfg, func(data filewatch.Contents) (held heldTLS, err error) {
		held.config, held.certificates, err = load(data)
		return held, err
	})
	if err != nil {
		return nil, fmt.Errorf("load TLS files: %w", err)
	}
	return &Files{files}, nil
}

// Get returns the configuration of the files as they are now, or of the last ones that could be
// used. It is the same pointer as long as these are the same.
func (f *Files) Get() *tls.Config { return f.Files.Get().config }

// Certificates returns the certificates of the files that are in use.
func (f *Files) Certificates() []Certificate { return f.Files.Get().certificates }

// KeyPair makes a certificate of its files.
func KeyPair(data filewatch.Contents, certFile, keyFile string) (tls.Certificate, error) {
	cert, err := tls.X509KeyPair(data[certFile], data[keyFile])
	if err == nil {
		err = filewatch.CompletePEM(certFile, data[certFile])
	}
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("load certificate %s with key %s: %w", certFile, keyFile, err)
	}
	return cert, nil
}

// ParseCAs returns the CA certificates in the PEM file at path, which holds data.
// ParseCAs returns the certificates of CAs in PEM.
func ParseCAs(path string, data []byte) (*x509.CertPool, []*x509.Certificate, error) {
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

// The values of the label use of etcd_kms_proxy_certificate_expiry_timestamp_seconds.
const (
	UseListener         = "listener"           // a listener's own certificate
	UseListenerClientCA = "listener_client_ca" // the CAs of a listener's clients
	UseEtcdClient       = "etcd_client"        // the client certificate for etcd
	UseEtcdCA           = "etcd_ca"            // the CAs of etcd's certificates
)

// Certificate says when what a file holds expires.
type Certificate struct {
	Use      string
	NotAfter time.Time
}

// ChainExpiry is that of a certificate with its intermediates: the first of them to expire counts.
func ChainExpiry(use string, cert tls.Certificate) Certificate {
	c := Certificate{Use: use}
	for _, der := range cert.Certificate {
		parsed, err := x509.ParseCertificate(der)
		if err != nil {
			continue // tls.LoadX509KeyPair has parsed the leaf; peers decide about the others
		}
		if c.NotAfter.IsZero() || parsed.NotAfter.Before(c.NotAfter) {
			c.NotAfter = parsed.NotAfter
		}
	}
	return c
}

// CaExpiry is that of a file of CA certificates: the last of them to expire counts. While a CA is
// replaced the file holds the old one and the new one, and a bundle may hold any number of others.
func CaExpiry(use string, cas []*x509.Certificate) Certificate {
	c := Certificate{Use: use}
	for _, ca := range cas {
		if ca.NotAfter.After(c.NotAfter) {
			c.NotAfter = ca.NotAfter
		}
	}
	return c
}

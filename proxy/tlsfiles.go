package proxy

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
	protocolHTTP1 = "http/1.1"
	protocolHTTP2 = "h2"
)

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

// The values of the label use of etcd_kms_proxy_certificate_expiry_timestamp_seconds.
const (
	useListener         = "listener"           // a listener's own certificate
	useListenerClientCA = "listener_client_ca" // the CAs of a listener's clients
	useEtcdClient       = "etcd_client"        // the client certificate for etcd
	useEtcdCA           = "etcd_ca"            // the CAs of etcd's certificates
)

// certificate says when what a file holds expires.
type certificate struct {
	use      string
	notAfter time.Time
}

// chainExpiry is that of a certificate with its intermediates: the first of them to expire counts.
func chainExpiry(use string, cert tls.Certificate) certificate {
	c := certificate{use: use}
	for _, der := range cert.Certificate {
		parsed, err := x509.ParseCertificate(der)
		if err != nil {
			continue // tls.LoadX509KeyPair has parsed the leaf; peers decide about the others
		}
		if c.notAfter.IsZero() || parsed.NotAfter.Before(c.notAfter) {
			c.notAfter = parsed.NotAfter
		}
	}
	return c
}

// caExpiry is that of a file of CA certificates: the last of them to expire counts. While a CA is
// replaced the file holds the old one and the new one, and a bundle may hold any number of others.
func caExpiry(use string, cas []*x509.Certificate) certificate {
	c := certificate{use: use}
	for _, ca := range cas {
		if ca.NotAfter.After(c.notAfter) {
			c.notAfter = ca.NotAfter
		}
	}
	return c
}

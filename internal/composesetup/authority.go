package composesetup

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net"
	"os"
	"slices"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/durable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

const (
	authorityLifetime = 10 * 365 * 24 * time.Hour
	leafLifetime      = 365 * 24 * time.Hour
	// backdate is how far the clocks of other machines may be behind.
	backdate = 5 * time.Minute
)

// authority is a certificate authority whose key is in a file.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte // of the certificate
}

// leaf is the content of a certificate.
type leaf struct {
	subject pkix.Name
	names   []string // host names and IP addresses
	usages  []x509.ExtKeyUsage
}

// openAuthority reads the authority from two files, or creates it if neither exists.
func openAuthority(certFile, keyFile, name string, now time.Time) (*authority, error) {
	certPEM, err := os.ReadFile(certFile) //nolint:gosec // below the operator's folder
	if errors.Is(err, fs.ErrNotExist) {
		return newAuthority(certFile, keyFile, name, now)
	}
	if err != nil {
		return nil, err
	}
	keyPEM, err := os.ReadFile(keyFile) //nolint:gosec // below the operator's folder
	if err != nil {
		return nil, err
	}
	start := "remove the volumes of certificates, which loses no data, and start again: new certificates are made"
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, problem.New(start, "%s and %s are not an authority and its key", certFile, keyFile)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, problem.New(start, "%s holds another kind of key", keyFile)
	}
	switch {
	case now.Before(pair.Leaf.NotBefore):
		return nil, problem.New("set the clock right: TLS connections fail until then", "%s is valid from %s, and this machine's clock says %s", certFile, pair.Leaf.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case now.After(pair.Leaf.NotAfter.Add(-leafLifetime)):
		return nil, problem.New("if the clock is right, "+start, "%s is valid until %s, and this machine's clock says %s", certFile, pair.Leaf.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return &authority{cert: pair.Leaf, key: key, pem: certPEM}, nil
}

func newAuthority(certFile, keyFile, name string, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLifetime),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	certPEM, err := sign(template, template, key, key)
	if err != nil {
		return nil, err
	}
	if err := writePair(certFile, certPEM, keyFile, key); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(certPEM)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, pem: certPEM}, nil
}

// issue makes a certificate and its key, unless the files hold one of this authority for the same
// leaf that is not in the last third of its lifetime.
func (a *authority) issue(certFile, keyFile string, l leaf, now time.Time) error {
	if a.isCurrent(certFile, keyFile, l, now) {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		Subject: l.subject, NotBefore: now.Add(-backdate), NotAfter: now.Add(leafLifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: l.usages, BasicConstraintsValid: true,
	}
	for _, name := range l.names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	certPEM, err := sign(template, a.cert, key, a.key)
	if err != nil {
		return err
	}
	return writePair(certFile, certPEM, keyFile, key)
}

// isCurrent reports whether the files hold a certificate that issue need not replace. What cannot
// be read or parsed is replaced.
func (a *authority) isCurrent(certFile, keyFile string, l leaf, now time.Time) bool {
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return false
	}
	cert := pair.Leaf
	names := slices.Clone(cert.DNSNames)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	slices.Sort(names)
	return cert.CheckSignatureFrom(a.cert) == nil && cert.Subject.String() == l.subject.String() &&
		slices.Equal(names, slices.Sorted(slices.Values(l.names))) && slices.Equal(cert.ExtKeyUsage, l.usages) &&
		!now.Before(cert.NotBefore) && now.Before(cert.NotAfter.Add(-leafLifetime/3))
}

// sign returns the certificate for key's public half as PEM.
func sign(template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) ([]byte, error) {
	var err error
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// writePair writes the key first: where the certificate is new, so is its key.
func writePair(certFile string, certPEM []byte, keyFile string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := writeChanged(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return err
	}
	return writeChanged(certFile, certPEM)
}

// newKeyPair makes a private key and its public half, unless both are there.
func newKeyPair(keyFile, publicFile string) error {
	if _, err := os.Stat(publicFile); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	return writePair(publicFile, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), keyFile, key)
}

// writeChanged writes a file with mode 0600 atomically, unless it has this content already.
func writeChanged(path string, data []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) { //nolint:gosec // below the operator's folder
		return nil
	}
	return durable.Write(path, data, 0o600)
}

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// pki is the certificates of the rows over TLS, as files and for the clients of this process.
type pki struct {
	caFile, certFile, keyFile, clientCertFile, clientKeyFile string

	client *tls.Config
}

// newPKI makes an authority, a server certificate for loopback and a client certificate in dir.
func newPKI(dir string) (*pki, error) {
	at := func(name string) string { return filepath.Join(dir, name) }
	p := &pki{caFile: at("ca.crt"), certFile: at("server.crt"), keyFile: at("server.key"),
		clientCertFile: at("client.crt"), clientKeyFile: at("client.key")}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caKey, err := issue(ca, ca, nil, p.caFile, "")
	if err != nil {
		return nil, err
	}
	leaf := func(serial int64, name string, usage x509.ExtKeyUsage) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
			// etcd dials its own address for the gateway, with the server's certificate.
			ExtKeyUsage: []x509.ExtKeyUsage{usage, x509.ExtKeyUsageClientAuth},
			DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	}
	if _, err := issue(leaf(2, "server", x509.ExtKeyUsageServerAuth), ca, caKey, p.certFile, p.keyFile); err != nil {
		return nil, err
	}
	// etcd's grpc-proxy refuses a client certificate with a common name.
	if _, err := issue(leaf(3, "", x509.ExtKeyUsageClientAuth), ca, caKey, p.clientCertFile, p.clientKeyFile); err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(p.clientCertFile, p.clientKeyFile)
	if err != nil {
		return nil, fmt.Errorf("load client certificate: %w", err)
	}
	roots := x509.NewCertPool()
	pemCA, err := os.ReadFile(p.caFile)
	if err != nil {
		return nil, err
	}
	roots.AppendCertsFromPEM(pemCA)
	p.client = &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	return p, nil
}

// issue writes a new certificate, and its key if keyFile is not "". parentKey is nil for an
// authority, which signs itself.
func issue(cert, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, certFile, keyFile string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	if parentKey == nil {
		parentKey = key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, &key.PublicKey, parentKey)
	if err != nil {
		return nil, fmt.Errorf("make certificate: %w", err)
	}
	if err := os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return nil, fmt.Errorf("write certificate: %w", err)
	}
	if keyFile == "" {
		return key, nil
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded}), 0o600); err != nil {
		return nil, fmt.Errorf("write key: %w", err)
	}
	return key, nil
}

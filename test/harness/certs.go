package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"time"
)

// CA signs the certificates of one test.
type CA struct {
	env  *Env
	name string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	// File is the CA's certificate in PEM.
	File string
}

// Pair is a certificate with its key, in PEM files.
type Pair struct {
	CertFile, KeyFile string
}

// NewCA returns a new certificate authority; name is the prefix of the names of its files.
func (e *Env) NewCA(name string) *CA {
	e.TB.Helper()
	ca := &CA{env: e, name: name, key: e.ecKey()}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &ca.key.PublicKey, ca.key)
	if err != nil {
		e.TB.Fatalf("sign CA: %v", err)
	}
	if ca.cert, err = x509.ParseCertificate(der); err != nil {
		e.TB.Fatalf("parse CA: %v", err)
	}
	ca.File = e.File(name+"-ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return ca
}

// Server signs a certificate for 127.0.0.1 and localhost, and for further names.
func (ca *CA) Server(name string, names ...string) Pair {
	ca.env.TB.Helper()
	return ca.sign(name, &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: append([]string{"localhost"}, names...),
	})
}

// Client signs a client certificate. The common name may be empty: etcd then derives no user from
// it.
func (ca *CA) Client(name, commonName string) Pair {
	ca.env.TB.Helper()
	return ca.sign(name, &x509.Certificate{
		Subject:     pkix.Name{CommonName: commonName, Organization: []string{"tests"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// Revoke writes a list of revoked certificates to file.
func (ca *CA) Revoke(file string, pairs ...Pair) {
	ca.env.TB.Helper()
	list := &x509.RevocationList{Number: big.NewInt(time.Now().UnixNano()), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for _, p := range pairs {
		cert, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
		if err != nil {
			ca.env.TB.Fatalf("load certificate: %v", err)
		}
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: cert.Leaf.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, ca.cert, ca.key)
	if err == nil {
		err = os.WriteFile(file+".new", pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}), 0o600)
	}
	if err == nil {
		err = os.Rename(file+".new", file)
	}
	if err != nil {
		ca.env.TB.Fatalf("revoke: %v", err)
	}
}

func (ca *CA) sign(name string, template *x509.Certificate) Pair {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		ca.env.TB.Fatalf("make serial number: %v", err)
	}
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	key := ca.env.ecKey()
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		ca.env.TB.Fatalf("sign certificate: %v", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		ca.env.TB.Fatalf("encode key: %v", err)
	}
	return Pair{
		CertFile: ca.env.File(ca.name+"-"+name+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		KeyFile:  ca.env.File(ca.name+"-"+name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})),
	}
}

// ClientTLS returns a client's TLS configuration that trusts the CA and presents pair.
func (ca *CA) ClientTLS(pair Pair) *tls.Config {
	ca.env.TB.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		ca.env.TB.Fatalf("load client certificate: %v", err)
	}
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
}

func (e *Env) ecKey() *ecdsa.PrivateKey {
	e.TB.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		e.TB.Fatalf("make key: %v", err)
	}
	return key
}

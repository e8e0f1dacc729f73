package kubeadm

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// Settings are, with the API server's manifest, the inputs of the proxy's configuration.
type Settings struct {
	Listen string // host:port of the proxy's listener
	Admin  string // host:port of its metrics and health

	// Certificate of the listener and its key. The CA in --etcd-cafile must have issued it.
	ListenerCert, ListenerKey string
	// ListenerClientCA verifies the API server's client certificate. "" means --etcd-cafile.
	ListenerClientCA string

	KMS KMS
	// DecryptOnly makes a rule that writes plaintext and reads encrypted values.
	DecryptOnly bool
}

// KMS is one provider, in the form of the configuration file. Exactly one of the pointers is set.
type KMS struct {
	Name    string   `yaml:"name"`
	Local   *Local   `yaml:"local,omitempty"`
	Plugin  *Plugin  `yaml:"plugin,omitempty"`
	Alibaba *Alibaba `yaml:"alibaba,omitempty"`
}

// Local is a key file.
type Local struct {
	KeyFile string `yaml:"keyFile"`
}

// Plugin is the socket of a KMS v2 plugin.
type Plugin struct {
	Endpoint string `yaml:"endpoint"`
}

// Alibaba is a key of Alibaba Cloud KMS.
type Alibaba struct {
	Region      string             `yaml:"region"`
	KeyID       string             `yaml:"keyID"`
	Endpoint    string             `yaml:"endpoint,omitempty"`
	Credentials AlibabaCredentials `yaml:"credentials"`
}

// AlibabaCredentials are the credentials for calls of the KMS.
type AlibabaCredentials struct {
	Type                string `yaml:"type"`
	AccessKeyIDFile     string `yaml:"accessKeyIDFile,omitempty"`
	AccessKeySecretFile string `yaml:"accessKeySecretFile,omitempty"`
	RoleName            string `yaml:"roleName,omitempty"`
}

// generatedHeader is the first line of every file that this package creates.
const generatedHeader = "# Written by etcd-kms-proxy kubeadm enable.\n"

type (
	fileListener struct {
		Address        string      `yaml:"address"`
		TLS            listenerTLS `yaml:"tls"`
		AllowedClients []string    `yaml:"allowedClients,flow"`
	}
	listenerTLS struct {
		CertFile     string `yaml:"certFile"`
		KeyFile      string `yaml:"keyFile"`
		ClientCAFile string `yaml:"clientCAFile"`
	}
	fileEtcd struct {
		Endpoints []string `yaml:"endpoints,flow"`
		TLS       etcdTLS  `yaml:"tls"`
	}
	etcdTLS struct {
		CAFile   string `yaml:"caFile"`
		CertFile string `yaml:"certFile"`
		KeyFile  string `yaml:"keyFile"`
	}
	fileRule struct {
		Prefix    string   `yaml:"prefix"`
		WriteWith string   `yaml:"writeWith"`
		ReadWith  []string `yaml:"readWith,omitempty,flow"`
	}
	fileAdmin struct {
		Address string `yaml:"address"`
	}
	file struct {
		APIVersion string         `yaml:"apiVersion"`
		Kind       string         `yaml:"kind"`
		Listeners  []fileListener `yaml:"listeners"`
		Etcd       fileEtcd       `yaml:"etcd"`
		KMS        []KMS          `yaml:"kms"`
		Rules      []fileRule     `yaml:"rules"`
		Admin      fileAdmin      `yaml:"admin"`
	}
)

// configuration returns the proxy's configuration file for an API server with this manifest and an
// etcd at endpoints. It verifies that the API server and the proxy will accept each other's
// certificates.
func (s *Settings) configuration(m *Manifest, endpoints []string) ([]byte, error) {
	ca, cert, key := m.Flag("etcd-cafile"), m.Flag("etcd-certfile"), m.Flag("etcd-keyfile")
	for _, f := range []struct{ name, value string }{{"etcd-cafile", ca}, {"etcd-certfile", cert}, {"etcd-keyfile", key}} {
		if f.value == "" {
			return nil, unrecognized("has no --%s", f.name)
		}
	}
	for _, e := range endpoints {
		if !strings.HasPrefix(e, "https://") {
			return nil, unrecognized("has the etcd server %s, which is not https://", e)
		}
	}
	clientCA := s.ListenerClientCA
	if clientCA == "" {
		clientCA = ca
	}
	host, _, err := net.SplitHostPort(s.Listen)
	if err != nil {
		return nil, problem.New("write it as in 127.0.0.1:12379", "--listen %s is not host:port", s.Listen)
	}
	if _, err := verify(s.ListenerCert, ca, host, x509.ExtKeyUsageServerAuth); err != nil {
		return nil, problem.New("use a certificate for "+host+" from the CA in "+ca+", with --listener-cert and --listener-key", "%s", "the API server would reject the proxy's certificate: "+err.Error())
	}
	leaf, err := verify(cert, clientCA, "", x509.ExtKeyUsageClientAuth)
	if err != nil {
		return nil, problem.New("set --listener-client-ca to the CA of "+cert, "%s", "the proxy would reject the API server's client certificate: "+err.Error())
	}
	if leaf.Subject.CommonName == "" {
		return nil, problem.New("give the proxy a configuration of your own with --config", "%s", "the API server's client certificate "+cert+" has no common name")
	}
	prefix := m.Flag("etcd-prefix")
	if prefix == "" {
		prefix = "/registry"
	}
	rule := fileRule{Prefix: "/" + strings.Trim(prefix, "/") + "/secrets/", WriteWith: s.KMS.Name}
	if s.DecryptOnly {
		rule.WriteWith, rule.ReadWith = "plaintext", []string{s.KMS.Name}
	}
	var b bytes.Buffer
	b.WriteString(generatedHeader)
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	err = e.Encode(file{
		APIVersion: "etcd-kms-proxy.io/v1alpha1", Kind: "ProxyConfiguration",
		Listeners: []fileListener{{s.Listen, listenerTLS{s.ListenerCert, s.ListenerKey, clientCA}, []string{leaf.Subject.CommonName}}},
		Etcd:      fileEtcd{endpoints, etcdTLS{ca, cert, key}},
		KMS:       []KMS{s.KMS}, Rules: []fileRule{rule}, Admin: fileAdmin{s.Admin},
	})
	return b.Bytes(), err
}

// verify returns the certificate in certFile. It fails unless a CA in caFile has issued the
// certificate for the given use and, if host is not empty, for that name.
func verify(certFile, caFile, host string, use x509.ExtKeyUsage) (*x509.Certificate, error) {
	certs, err := certificates(certFile)
	if err != nil {
		return nil, err
	}
	cas, err := certificates(caFile)
	if err != nil {
		return nil, err
	}
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), DNSName: host, KeyUsages: []x509.ExtKeyUsage{use}}
	for _, c := range cas {
		o.Roots.AddCert(c)
	}
	for _, c := range certs[1:] {
		o.Intermediates.AddCert(c)
	}
	if _, err := certs[0].Verify(o); err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	return certs[0], nil
}

// certificates returns the certificates of a PEM file, at least one.
func certificates(path string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(path) //nolint:gosec // a path from the API server's manifest or the operator
	if err != nil {
		return nil, err
	}
	var all []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s holds no PEM certificate", path)
	}
	return all, nil
}

package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"google.golang.org/grpc/credentials"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
)

// TLS is the TLS side of the connection to etcd. The files are read again when they change.
type TLS struct {
	CAFile             string // PEM; empty: the system's CAs
	CertFile, KeyFile  string // PEM; the client certificate, both or neither
	ServerName         string // empty: each endpoint is verified against its own host
	InsecureSkipVerify bool   // take any server certificate
}

// Credentials makes each connection to etcd with the files of the moment.
type Credentials struct {
	Files *tlsfiles.Files
}

var _ credentials.TransportCredentials = (*Credentials)(nil)

// credentials reads the files; those of a nil TLS verify etcd against the system's CAs.
func (c *TLS) credentials(log *slog.Logger) (*Credentials, error) {
	if c == nil {
		c = &TLS{}
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		return nil, errors.New("etcd TLS: certFile and keyFile: one needs the other")
	}
	live := filewatch.Config{Paths: []string{c.CAFile, c.CertFile, c.KeyFile}, What: "etcd", Logger: log}
	files, err := tlsfiles.New(live, func(data filewatch.Contents) (*tls.Config, []tlsfiles.Certificate, error) {
		var held []tlsfiles.Certificate
		cfg := &tls.Config{
			MinVersion:         tls.VersionTLS12,
			ServerName:         c.ServerName,
			InsecureSkipVerify: c.InsecureSkipVerify, //nolint:gosec // spelled out by the operator
		}
		if c.CAFile != "" {
			pool, cas, err := tlsfiles.ParseCAs(c.CAFile, data[c.CAFile])
			if err != nil {
				return nil, nil, err
			}
			cfg.RootCAs = pool
			held = append(held, tlsfiles.CaExpiry(tlsfiles.UseEtcdCA, cas))
		}
		if c.CertFile != "" {
			cert, err := tlsfiles.KeyPair(data, c.CertFile, c.KeyFile)
			if err != nil {
				return nil, nil, err
			}
			cfg.Certificates = []tls.Certificate{cert}
			held = append(held, tlsfiles.ChainExpiry(tlsfiles.UseEtcdClient, cert))
		}
		return cfg, held, nil
	})
	if err != nil {
		return nil, fmt.Errorf("etcd TLS: %w", err)
	}
	return &Credentials{Files: files}, nil
}

// ClientHandshake implements credentials.TransportCredentials. authority is the endpoint's own
// host, which its certificate is verified against unless the configuration has a server name.
func (c *Credentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg := c.Files.Get()
	if cfg.ServerName != "" {
		authority = cfg.ServerName
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
}

// ServerHandshake implements credentials.TransportCredentials; these credentials are a client's.
func (c *Credentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server handshake with a client's credentials")
}

// Info implements credentials.TransportCredentials.
func (c *Credentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (c *Credentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials; the name is the configuration's
// to say.
func (c *Credentials) OverrideServerName(string) error {
	return errors.New("override server name: not supported")
}

// commonName is that of the client certificate, if there is one.
func (c *Credentials) commonName() string {
	if c == nil {
		return ""
	}
	certs := c.Files.Get().Certificates
	if len(certs) == 0 || certs[0].Leaf == nil {
		return ""
	}
	return certs[0].Leaf.Subject.CommonName
}

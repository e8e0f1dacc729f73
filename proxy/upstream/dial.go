package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// address splits an endpoint into what package net dials.
func address(endpoint string) (network, addr string) {
	scheme, rest, ok := strings.Cut(endpoint, "://")
	switch {
	case !ok:
		return "tcp", endpoint
	case strings.HasPrefix(scheme, "unix"):
		return "unix", rest
	}
	return "tcp", strings.TrimRight(rest, "/")
}

// errProtocol is that of an endpoint that speaks another protocol than the one that is requested.
var errProtocol = errors.New("another protocol")

// DialEndpoint connects to an endpoint, over TLS where the endpoints have that, to speak protocol.
// What conn writes to is buffer.
func (u *Cluster) DialEndpoint(ctx context.Context, endpoint, protocol string) (conn net.Conn, buffer *writebuffer.Buffer, err error) {
	return dialEndpoint(ctx, endpoint, u.TLS, protocol)
}

// dialEndpoint connects to an endpoint, over TLS unless creds is nil.
func dialEndpoint(ctx context.Context, endpoint string, creds *Credentials, protocol string) (conn net.Conn, buffer *writebuffer.Buffer, err error) {
	network, addr := address(endpoint)
	var dialer net.Dialer
	plain, err := dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, nil, err
	}
	buffer = writebuffer.New(plain)
	if creds == nil {
		return buffer, buffer, nil
	}
	cfg := creds.Files.Get().Clone()
	cfg.NextProtos = []string{protocol}
	if cfg.ServerName == "" {
		cfg.ServerName = path.Base(addr) // of a socket, which is what etcd's client library takes
		if host, _, err := net.SplitHostPort(cfg.ServerName); err == nil {
			cfg.ServerName = host
		}
	}
	secure := tls.Client(buffer, cfg)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = buffer.Close()
		return nil, nil, err
	}
	if got := secure.ConnectionState().NegotiatedProtocol; got != protocol && got != "" {
		_ = secure.Close()
		return nil, nil, fmt.Errorf("%w: %s speaks %q over TLS, and not %q", errProtocol, endpoint, got, protocol)
	}
	return secure, buffer, nil
}

// Origin is the scheme and the authority that requests to an endpoint name.
func (u *Cluster) Origin(endpoint string) (scheme, authority string) {
	scheme = "http"
	if u.TLS != nil {
		scheme = "https"
	}
	network, addr := address(endpoint)
	if network == "unix" {
		return scheme, "localhost"
	}
	return scheme, addr
}

package listener

import (
	"net"
	"net/netip"
	"net/url"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
)

// HostPolicy says which HTTP requests a listener accepts. It protects operators from web pages: a
// browser on the same machine or network reaches every listener that needs no client certificate,
// and sends there what any page tells it to. A nil policy accepts any Host.
type HostPolicy struct {
	NoGateway bool            // the JSON gateway is off
	anyHost   bool            // a unix socket, which no browser reaches
	names     map[string]bool // host names that the configuration gives the listener
	tls       *tlsfiles.Files // its certificate names it, too; nil for cleartext
}

// newHostPolicy makes the policy of a listener.
func newHostPolicy(cfg Config, files *tlsfiles.Files) *HostPolicy {
	p := &HostPolicy{NoGateway: cfg.NoGateway, anyHost: strings.HasPrefix(cfg.Address, "unix:"), names: make(map[string]bool), tls: files}
	if host := hostName(cfg.Address); host != "" {
		p.names[host] = true
	}
	for _, advertised := range cfg.AdvertiseClientURLs {
		if u, err := url.Parse(advertised); err == nil && u.Host != "" {
			p.names[hostName(u.Host)] = true
		}
	}
	return p
}

// hostName returns the host of "host" or "host:port" in the spelling in which names are compared.
func hostName(hostport string) string {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// isLoopbackName reports whether a name means this machine wherever it is looked up, so that nobody
// else can have it resolve to an address of their choice.
func isLoopbackName(name string) bool {
	switch name {
	case "localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback":
		return true
	}
	return strings.HasSuffix(name, ".localhost")
}

// Allows reports whether a request may name hostport as its host. A page that has its own name
// resolve to the listener's address (DNS rebinding) is of the same origin as the listener, but its
// requests give its own name away. Browsers always send a host.
func (p *HostPolicy) Allows(hostport string) bool {
	if p == nil || p.anyHost || hostport == "" {
		return true
	}
	name := hostName(hostport)
	if isLoopbackName(name) || p.names[name] {
		return true
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return true
	}
	if p.tls == nil {
		return false
	}
	for _, cert := range p.tls.Get().Certificates {
		if cert.Leaf != nil && cert.Leaf.VerifyHostname(name) == nil {
			return true
		}
	}
	return false
}

package config

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// checker has the checks of single fields, which several blocks share.
type checker struct {
	*reporter
	dir  string                            // that relative file names count from
	read func(path string) ([]byte, error) // reads files that are named
}

func newChecker(dir string, read func(path string) ([]byte, error)) checker {
	return checker{&reporter{lines: map[string]int{"": 1}, reported: make(map[string]bool)}, dir, read}
}

// maxDuration bounds every duration: ten years, so that nothing overflows when it is added to a
// time.
const maxDuration = 10 * 365 * 24 * time.Hour

func (c *checker) duration(path string, x, least time.Duration) {
	if x < least || x > maxDuration {
		c.report(path, "", "%v is not between %v and 10 years", x, least)
	}
}

func (c *checker) between(path string, x, least, most int, hint string) {
	if x < least || x > most {
		c.report(path, hint, "%d is not between %d and %d", x, least, most)
	}
}

func (c *checker) oneOf(path, got string, known ...string) {
	if !slices.Contains(known, got) {
		c.report(path, "write "+strings.Join(known, " or "), "%q is unknown", got)
	}
}

// hostPort checks a TCP address. ok is false if it reported a problem.
func (c *checker) hostPort(path, address string) (host, port string, ok bool) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || strings.Contains(address, "://") {
		c.report(path, "write host:port, e.g. 127.0.0.1:2379, or [::1]:2379 for IPv6", "%q is not host:port", address)
		return "", "", false
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		c.report(path, "ports are numbers from 0 to 65535", "%q is not a port", port)
		return "", "", false
	}
	if strings.ContainsAny(host, " /?#@") {
		c.report(path, "", "%q is not a host name or IP address", host)
		return "", "", false
	}
	return host, port, true
}

// filledIn reports whether an endpoint is without the [Placeholder]. If it is not, it reports a
// problem.
func (c *checker) filledIn(path, endpoint string) bool {
	if strings.Contains(endpoint, Placeholder) {
		c.report(path, "write your own endpoint", "%q still contains the placeholder %s", redactURL(endpoint), Placeholder)
		return false
	}
	return true
}

// socket reports whether address is a unix:///path. If it is not, it reports a problem.
func (c *checker) socket(path, address string) bool {
	name, ok := strings.CutPrefix(address, "unix://")
	switch {
	case !c.filledIn(path, address):
	case !ok || !filepath.IsAbs(name) || filepath.Clean(name) != name:
		c.report(path, "write unix:///path/to/socket, with three slashes", "%q does not name a socket by its full path", address)
	case len(name) > 107:
		c.report(path, "use a shorter path", "the socket's path has %d bytes, and the system's limit is 107", len(name))
	case strings.ContainsAny(name, "\x00?#%"):
		c.report(path, "use a plain path", "%q has a character that clients cannot write in a URL", address)
	default:
		return true
	}
	return false
}

// clientURL checks a URL of an etcd member and returns its scheme.
func (c *checker) clientURL(path, text string) string {
	if !c.filledIn(path, text) {
		return ""
	}
	if strings.HasPrefix(text, "unix:") {
		if !c.socket(path, text) {
			return ""
		}
		return "unix"
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		c.report(path, "write https://host:port, http://host:port or unix:///path", "%q is not the URL of an etcd member", redactURL(text))
		return ""
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && u.Path != "/" {
		c.report(path, "", "%q has more than a host and a port", redactURL(text))
		return ""
	}
	if _, port, ok := c.hostPort(path, u.Host); !ok {
		return ""
	} else if u.Hostname() == "" || port == "0" {
		c.report(path, "", "%q names no host, or no port to connect to", text)
		return ""
	}
	return u.Scheme
}

// httpsHost checks the host, or host and port, of a service that is only reached over HTTPS.
func (c *checker) httpsHost(path, host string) {
	if c.filledIn(path, host) && (strings.Contains(host, "://") || strings.ContainsAny(host, "/?#@ ")) {
		c.report(path, "write host or host:port; the proxy always uses HTTPS", "%q is not a host", redactURL(host))
	}
}

// certPool checks a file of certificates. A file that cannot be read was reported when it was
// decoded.
func (c *checker) certPool(path, file string) {
	if file == "" {
		return
	}
	data, err := c.read(file)
	if err != nil {
		return
	}
	n := 0
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			c.report(path, "replace the file", "%s: certificate %d cannot be parsed", file, n+1)
			return
		}
		n++
	}
	if n == 0 {
		c.report(path, "it needs at least one block that begins -----BEGIN CERTIFICATE-----", "%s holds no PEM certificate", file)
	}
}

// keyPair checks a certificate and its key. The texts of crypto/tls name what is wrong and quote
// nothing of the key.
func (c *checker) keyPair(at, certFile, keyFile string) {
	if certFile == "" && keyFile == "" {
		return
	}
	if certFile == "" || keyFile == "" {
		if !c.reported[at+".certFile"] && !c.reported[at+".keyFile"] {
			c.report(at, "give both, or neither", "has one of certFile and keyFile")
		}
		return
	}
	cert, err := c.read(certFile)
	if err != nil {
		return
	}
	key, err := c.read(keyFile)
	if err != nil {
		return
	}
	if _, err := tls.X509KeyPair(cert, key); err != nil {
		c.report(at+".certFile", "check that both are PEM and belong together", "%s and %s are not a certificate and its key: %s",
			certFile, keyFile, strings.TrimPrefix(err.Error(), "tls: "))
	}
}

// isLoopback reports whether only this machine reaches host.
func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return host == "localhost"
	}
	return ip.Unmap().IsLoopback()
}

// redactURL drops what may be a password.
func redactURL(text string) string {
	if i := strings.LastIndexByte(text, '@'); i >= 0 {
		return "…" + text[i:]
	}
	return text
}

// fileError says why a file could not be read. The path is first, since a typing error in it is
// often the cause.
func fileError(err error) string {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return fmt.Sprintf("%s: %v", e.Path, e.Err)
	}
	return err.Error()
}

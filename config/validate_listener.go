package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"go.etcd.io/etcd/client/pkg/v3/tlsutil"
)

func (v *validator) listeners(listeners []Listener, endpoints []string) {
	seen := make(map[string]int)
	for i, l := range listeners {
		at := fmt.Sprintf("listeners[%d]", i)
		if l.Address == "" {
			continue // reported as missing
		}
		first, twice := seen[l.Address]
		if twice && !strings.HasSuffix(l.Address, ":0") {
			v.report(at+".address", "give each listener an address of its own", "is the address of listeners[%d] too", first)
		}
		seen[l.Address] = i
		v.reach(at, l)
		if l.TLS != nil {
			v.listenerTLS(at+".tls", l.TLS)
		}
		v.clients(at, l)
		for n, u := range l.AdvertiseClientURLs {
			parsed, err := url.Parse(u)
			if path := fmt.Sprintf("%s.advertiseClientURLs[%d]", at, n); err != nil || parsed.Hostname() == "" || parsed.Port() == "" || parsed.Path != "" || parsed.User != nil || parsed.RawQuery != "" {
				v.report(path, "write https://host:port", "%q is not the URL of a host and port", u)
			} else if want := map[bool]string{true: "https", false: "http"}[l.TLS != nil]; parsed.Scheme != want {
				v.report(path, "", "begins with %s://, but the listener speaks %s://", parsed.Scheme, want)
			}
		}
		if l.Endpoint != "" && !slices.Contains(endpoints, l.Endpoint) {
			v.report(at+".endpoint", "copy it from etcd.endpoints", "is not one of etcd.endpoints")
		}
	}
}

// reach checks a listener's address against who can reach it.
func (v *validator) reach(at string, l Listener) {
	if strings.HasPrefix(l.Address, "unix:") {
		v.socket(at+".address", l.Address)
		if _, err := parseMode(l.Mode); err != nil {
			v.report(at+".mode", `write an octal number such as "0600" or "0660"`, "%v", err)
		}
		return
	}
	name, fromSystemd := l.SystemdName()
	if v.present(at + ".mode") {
		if fromSystemd {
			v.report(at+".mode", "set SocketMode= in the socket unit, and remove it here", "systemd makes the socket")
		} else {
			v.report(at+".mode", "remove it", "only unix sockets have a mode")
		}
	}
	contradicts := l.TLS != nil && l.InsecurePlaintext
	if contradicts {
		v.report(at+".insecurePlaintext", "remove it, or the tls block", "contradicts tls")
	}
	if fromSystemd { // its address is known at the start
		if !systemdName(name) {
			v.report(at+".address", "write systemd://NAME, with the FileDescriptorName= of the socket unit", "%q is not a name of a socket", name)
		}
		return
	}
	host, _, ok := v.hostPort(at+".address", l.Address)
	if !ok || contradicts {
		return
	}
	if text, field, hint := l.unprotected(host, l.Address); text != "" {
		v.report(at+field, hint, "%s", text)
	}
}

// unprotected says what is missing where other machines reach host; field is the one to change,
// below the listener. text is empty if nothing is.
func (l Listener) unprotected(host, address string) (text, field, hint string) {
	switch {
	case isLoopback(host) || l.InsecurePlaintext:
		return "", "", ""
	case l.TLS == nil:
		return fmt.Sprintf("other machines reach %s, and every value would cross the network in plaintext", address), "",
			"add tls with clientCAFile, listen on 127.0.0.1 or a unix socket, or write insecurePlaintext: true"
	case l.TLS.ClientCAFile == "":
		return fmt.Sprintf("is required, because other machines reach %s", address), ".tls.clientCAFile",
			"name the certificates that client certificates are verified against"
	}
	return "", "", ""
}

// SystemdName returns the name of the sockets that systemd passes, for an address `systemd://NAME`.
func (l Listener) SystemdName() (name string, ok bool) {
	return strings.CutPrefix(l.Address, "systemd://")
}

// CheckSocket returns what Load could not know of an address `systemd://NAME`: a [Problem] if other
// machines reach the socket's address and the listener has no TLS with client certificates.
func (l Listener) CheckSocket(path string, addr net.Addr) *Problem {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return nil
	}
	text, field, hint := l.unprotected(tcp.IP.String(), tcp.String())
	if text == "" {
		return nil
	}
	return &Problem{Path: path + field, Text: text, Hint: hint}
}

// systemdName reports whether systemd takes name in FileDescriptorName=: printable ASCII without a
// colon, 255 characters at most. Slashes and white space are refused too, for what was meant to be
// a path.
func systemdName(name string) bool {
	return name != "" && len(name) <= 255 && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == ':' || r == '/' })
}

// clients checks the lists of client names.
func (v *validator) clients(at string, l Listener) {
	for _, list := range []struct {
		name  string
		names []string
	}{{"allowedClients", l.AllowedClients}, {"ciphertextClients", l.CiphertextClients}} {
		at := at + "." + list.name
		if len(list.names) > 0 && (l.TLS == nil || l.TLS.ClientCAFile == "") {
			v.report(at, "add tls with clientCAFile", "clients have no names without client certificates")
		}
		for j, name := range list.names {
			if name == "" {
				v.report(fmt.Sprintf("%s[%d]", at, j), "", "is empty")
			} else if slices.Contains(list.names[:j], name) {
				v.report(fmt.Sprintf("%s[%d]", at, j), "remove one of them", "%q is in the list twice", name)
			}
		}
	}
}

func (v *validator) listenerTLS(at string, t *ListenerTLS) {
	v.keyPair(at, t.CertFile, t.KeyFile)
	v.certPool(at+".clientCAFile", t.ClientCAFile)
	v.oneOf(at+".minVersion", t.MinVersion, "1.2", "1.3")
	if t.ClientCRLFile != "" {
		if t.ClientCAFile == "" {
			v.report(at+".clientCRLFile", "add clientCAFile", "has no effect without clientCAFile")
		} else if data, err := v.read(t.ClientCRLFile); err == nil {
			if err := checkCRL(data); err != nil {
				v.report(at+".clientCRLFile", "", "%s: %v", t.ClientCRLFile, err)
			}
		}
	}
	if len(t.CipherSuites) > 0 && t.MinVersion == "1.3" {
		v.report(at+".cipherSuites", "remove it", "the suites of TLS 1.3 cannot be chosen")
		return
	}
	for i, name := range t.CipherSuites {
		at := fmt.Sprintf("%s.cipherSuites[%d]", at, i)
		id, known := tlsutil.GetCipherSuite(name)
		i := slices.IndexFunc(tls.CipherSuites(), func(s *tls.CipherSuite) bool { return s.ID == id })
		switch {
		case !known:
			v.report(at, "use IANA names such as TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "%q is not a cipher suite", name)
		case i < 0:
			v.report(at, "remove it", "%s has known weaknesses", name)
		case !slices.Contains(tls.CipherSuites()[i].SupportedVersions, tls.VersionTLS12):
			v.report(at, "remove it", "%s is of TLS 1.3, whose suites cannot be chosen", name)
		}
	}
}

func checkCRL(data []byte) error {
	if block, _ := pem.Decode(data); block != nil {
		if block.Type != "X509 CRL" {
			return fmt.Errorf("holds a PEM block of type %q, not X509 CRL", block.Type)
		}
		data = block.Bytes
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return errors.New("is empty")
	}
	if _, err := x509.ParseRevocationList(data); err != nil {
		return errors.New("is not a certificate revocation list")
	}
	return nil
}

// parseMode returns a socket's permission bits. The proxy's own user must have its two, or nobody
// could connect.
func parseMode(text string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(text, 8, 32)
	if err != nil || n > 0o777 {
		return 0, fmt.Errorf("%q is not an octal permission", text)
	}
	if n&0o600 != 0o600 {
		return 0, fmt.Errorf("%q does not let the owner read and write", text)
	}
	return fs.FileMode(n), nil
}

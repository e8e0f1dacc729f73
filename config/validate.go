package config

import (
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

// validate checks what the fields say, and what they say of each other.
func (d *decoder) validate(c *Config) {
	if c.APIVersion != APIVersion {
		d.report("apiVersion", "write "+APIVersion, "is %q, which this version does not read", c.APIVersion)
	}
	if c.Kind != Kind {
		d.report("kind", "write "+Kind, "is %q, which this version does not read", c.Kind)
	}
	d.listeners(c.Listeners, c.Etcd.Endpoints)
	d.etcd(&c.Etcd)
	d.kms(c.KMS)
	d.rules(c)
	d.cache(&c.Cache)
	if c.Admin != nil {
		d.admin(c.Admin, c.Listeners)
	}
	d.coordination(c)
	d.audit(c.Audit)
	d.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	d.oneOf("log.format", c.Log.Format, "json", "text")
}

// further makes the checks of others, of the parts that are good so far.
func (d *decoder) further(c *Config, checks Checks) {
	add := func(at string, ps []Problem) {
		for _, p := range ps {
			path := at
			if p.Path != "" {
				path += "." + p.Path
			}
			d.reportAt(d.line(path), path, p.Hint, "%s", p.Text) // a part may have several
		}
	}
	for i, k := range c.KMS {
		if at := fmt.Sprintf("kms[%d]", i); checks.KMS != nil && !d.faulty(at) {
			add(at, checks.KMS(k))
		}
	}
	if checks.Audit != nil && c.Audit != nil && !d.faulty("audit") {
		add("audit", checks.Audit(*c.Audit))
	}
}

// faulty reports whether a problem was reported for path or something in it.
func (d *decoder) faulty(path string) bool {
	for bad := range d.bad {
		if rest, ok := strings.CutPrefix(bad, path); ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			return true
		}
	}
	return false
}

func (d *decoder) cache(c *Cache) {
	if c.Seeds < 1 || c.Seeds > 10_000_000 {
		d.report("cache.seeds", "the default is 10000", "%d is not between 1 and 10000000", c.Seeds)
	}
	d.duration("cache.ttl", c.TTL, time.Second)
	d.duration("cache.serveUnreachableFor", c.ServeUnreachableFor, 0)
	d.duration("cache.sealUnreachableFor", c.SealUnreachableFor, 0)
	d.duration("cache.revokeWithin", c.RevokeWithin, time.Second)
}

func (d *decoder) admin(a *Admin, listeners []Listener) {
	host, port, ok := d.hostPort("admin.address", a.Address)
	if !ok {
		return
	}
	if !isLoopback(host) {
		d.warn("admin.address", "listen on 127.0.0.1, or let none but the monitoring reach it",
			"other machines reach %s, and the admin server has no authentication: it shows the prefixes of rules, and the IDs and states of KMS keys", a.Address)
	}
	if a.Pprof && !isLoopback(host) {
		d.report("admin.pprof", "turn it off, or listen on 127.0.0.1", "profiles are served on a loopback address only, and %s is none", a.Address)
	}
	for i, l := range listeners {
		if port != "0" && l.Address == a.Address {
			d.report("admin.address", "choose another port", "is the address of listeners[%d]", i)
		}
	}
}

// maxDuration bounds every duration: ten years, so that nothing overflows when it is added to a
// time.
const maxDuration = 10 * 365 * 24 * time.Hour

func (d *decoder) duration(path string, x, least time.Duration) {
	if x < least || x > maxDuration {
		d.report(path, "", "%v is not between %v and 10 years", x, least)
	}
}

func (d *decoder) oneOf(path, got string, known ...string) {
	if !slices.Contains(known, got) {
		d.report(path, "write "+strings.Join(known, " or "), "%q is unknown", got)
	}
}

// hostPort checks a TCP address. ok is false if it reported a problem.
func (d *decoder) hostPort(path, address string) (host, port string, ok bool) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || strings.Contains(address, "://") {
		d.report(path, "write host:port, e.g. 127.0.0.1:2379, or [::1]:2379 for IPv6", "%q is not host:port", address)
		return "", "", false
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		d.report(path, "ports are numbers from 0 to 65535", "%q is not a port", port)
		return "", "", false
	}
	if strings.ContainsAny(host, " /?#@") {
		d.report(path, "", "%q is not a host name or IP address", host)
		return "", "", false
	}
	return host, port, true
}

// isLoopback reports whether only this machine reaches host.
func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return host == "localhost"
	}
	return ip.Unmap().IsLoopback()
}

// socket checks a unix:///path and returns the path.
func (d *decoder) socket(path, address string) (string, bool) {
	name, ok := strings.CutPrefix(address, "unix://")
	switch {
	case !ok || !filepath.IsAbs(name) || filepath.Clean(name) != name:
		d.report(path, "write unix:///path/to/socket, with three slashes", "%q does not name a socket by its full path", address)
	case len(name) > 107:
		d.report(path, "use a shorter path", "the socket's path has %d bytes, and the system's limit is 107", len(name))
	case strings.ContainsAny(name, "\x00?#%"):
		d.report(path, "use a plain path", "%q has a character that clients cannot write in a URL", address)
	default:
		return name, true
	}
	return "", false
}

// clientURL checks a URL of an etcd member and returns its scheme.
func (d *decoder) clientURL(path, text string) string {
	if strings.HasPrefix(text, "unix:") {
		if _, ok := d.socket(path, text); !ok {
			return ""
		}
		return "unix"
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		d.report(path, "write https://host:port, http://host:port or unix:///path", "%q is not the URL of an etcd member", redactURL(text))
		return ""
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && u.Path != "/" {
		d.report(path, "", "%q has more than a host and a port", redactURL(text))
		return ""
	}
	if _, port, ok := d.hostPort(path, u.Host); !ok {
		return ""
	} else if u.Hostname() == "" || port == "0" {
		d.report(path, "", "%q names no host, or no port to connect to", text)
		return ""
	}
	return u.Scheme
}

// redactURL drops what may be a password.
func redactURL(text string) string {
	if i := strings.LastIndexByte(text, '@'); i >= 0 {
		return "…" + text[i:]
	}
	return text
}

func (d *decoder) etcd(e *Etcd) {
	schemes := make(map[string]string)
	for i, u := range e.Endpoints {
		at := fmt.Sprintf("etcd.endpoints[%d]", i)
		if slices.Contains(e.Endpoints[:i], u) {
			d.report(at, "remove one of them", "%q is in the list twice", redactURL(u))
			continue
		}
		scheme := d.clientURL(at, u)
		if scheme == "" {
			continue
		}
		for other, first := range schemes {
			if other != scheme {
				d.report(at, "", "is of scheme %s while %s is of scheme %s: all endpoints are of one kind", scheme, first, other)
			}
		}
		if len(schemes) == 0 {
			schemes[scheme] = at
		}
	}
	overTLS := d.httpEndpoints(e)
	if e.MaxRequestBytes < 1 || e.MaxRequestBytes > 1<<30 {
		d.report("etcd.maxRequestBytes", "the default is 1572864, as etcd's", "%d is not between 1 and 1073741824", e.MaxRequestBytes)
	}
	if (e.Username == "") != (e.PasswordFile == "") {
		d.report("etcd.username", "write both or neither", "username and passwordFile: one needs the other")
	}
	if e.TLS == nil {
		return
	}
	_, cleartext := schemes["http"]
	if _, ok := schemes["https"]; len(schemes) > 0 && !ok && (!cleartext || !overTLS) {
		d.report("etcd.tls", "write https:// endpoints, or remove the block", "has no effect, because no endpoint begins with https://")
	}
	d.certPool("etcd.tls.caFile", e.TLS.CAFile)
	d.keyPair("etcd.tls", e.TLS.CertFile, e.TLS.KeyFile)
	if e.TLS.InsecureSkipVerify && (e.TLS.CAFile != "" || e.TLS.ServerName != "") {
		d.report("etcd.tls.insecureSkipVerify", "remove it: caFile and serverName say what to verify", "contradicts the rest of etcd.tls")
	}
}

// httpEndpoints checks the URLs where etcd serves HTTP, and reports whether one of them is
// https://.
func (d *decoder) httpEndpoints(e *Etcd) (overTLS bool) {
	if n := len(e.HTTPEndpoints); n > 0 && n != len(e.Endpoints) {
		d.report("etcd.httpEndpoints", "write the URL of each member, in the order of etcd.endpoints", "has %d URLs for %d endpoints", n, len(e.Endpoints))
	}
	for i, u := range e.HTTPEndpoints {
		if d.clientURL(fmt.Sprintf("etcd.httpEndpoints[%d]", i), u) == "https" {
			overTLS = true
		}
	}
	return overTLS
}

func (d *decoder) rules(c *Config) {
	defined := []string{Plaintext}
	for _, k := range c.KMS {
		defined = append(defined, k.Name)
	}
	seen := make(map[string]int)
	for i, r := range c.Rules {
		at := fmt.Sprintf("rules[%d]", i)
		if d.present(at + ".prefix") {
			if first, twice := seen[r.Prefix]; twice {
				d.report(at+".prefix", "remove one of them", "%q is the prefix of rules[%d] too", r.Prefix, first)
			} else {
				seen[r.Prefix] = i
			}
		}
		if r.WriteWith != "" && !slices.Contains(defined, r.WriteWith) {
			d.report(at+".writeWith", undefined(defined), "no KMS provider is called %q", r.WriteWith)
		}
		for j, name := range r.ReadWith {
			at := fmt.Sprintf("%s.readWith[%d]", at, j)
			switch {
			case name == Plaintext:
				d.report(at, "allowPlaintextReads says whether plaintext may be read", "%q is not a KMS provider", name)
			case !slices.Contains(defined, name):
				d.report(at, undefined(defined[1:]), "no KMS provider is called %q", name)
			case slices.Contains(r.ReadWith[:j], name):
				d.report(at, "remove one of them", "%q is in the list twice", name)
			}
		}
		d.writers(at, r, c.KMS)
		d.recovery(at, i, c.Rules, defined)
		d.oneOf(at+".onUndecryptable", r.OnUndecryptable, "error", "passthrough")
		if r.WriteWith == Plaintext && !r.AllowPlaintextReads {
			d.report(at+".allowPlaintextReads", "write true, or name a KMS provider in writeWith", "the rule writes plaintext that it may not read")
		}
	}
}

func undefined(known []string) string {
	// that one is missing is a problem of its own
	known = slices.DeleteFunc(slices.Clone(known), func(name string) bool { return name == "" })
	if len(known) == 0 {
		return "define it under kms"
	}
	return "define it under kms, or use " + strings.Join(known, " or ")
}

// fileError says why a file could not be read. The path is first, since a typing error in it is
// often the cause.
func fileError(err error) string {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return fmt.Sprintf("%s: %v", e.Path, e.Err)
	}
	return err.Error()
}

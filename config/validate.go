package config

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// validator checks what the fields say, and what they say of each other. It has a method for each
// block of the file.
type validator struct{ checker }

// validate checks what the fields say, and what they say of each other.
func (v *validator) validate(c *Config) {
	if c.APIVersion != APIVersion {
		v.report("apiVersion", "write "+APIVersion, "is %q, which this version does not read", c.APIVersion)
	}
	if c.Kind != Kind {
		v.report("kind", "write "+Kind, "is %q, which this version does not read", c.Kind)
	}
	v.listeners(c.Listeners, c.Etcd.Endpoints)
	v.etcd(&c.Etcd)
	v.kms(c.KMS)
	v.rules(c)
	v.cache(&c.Cache)
	if c.Admin != nil {
		v.admin(c.Admin, c.Listeners)
	}
	v.coordination(c)
	v.audit(c.Audit)
	v.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	v.oneOf("log.format", c.Log.Format, "json", "text")
}

// checkParts makes the checks of others, of the parts that are good so far.
func (v *validator) checkParts(c *Config, checks Checks) {
	add := func(at string, ps []Problem) {
		for _, p := range ps {
			path := at
			if p.Path != "" {
				path += "." + p.Path
			}
			v.reportAt(v.line(path), path, p.Hint, "%s", p.Text) // a part may have several
		}
	}
	for i, k := range c.KMS {
		if at := fmt.Sprintf("kms[%d]", i); checks.KMS != nil && !v.hasProblem(at) {
			add(at, checks.KMS(k))
		}
	}
	if checks.Audit != nil && c.Audit != nil && !v.hasProblem("audit") {
		add("audit", checks.Audit(*c.Audit))
	}
}

func (v *validator) cache(c *Cache) {
	v.between("cache.seeds", c.Seeds, 1, 10_000_000, "the default is 10000")
	v.duration("cache.ttl", c.TTL, time.Second)
	v.duration("cache.serveUnreachableFor", c.ServeUnreachableFor, 0)
	v.duration("cache.sealUnreachableFor", c.SealUnreachableFor, 0)
	v.duration("cache.revokeWithin", c.RevokeWithin, time.Second)
}

func (v *validator) admin(a *Admin, listeners []Listener) {
	host, port, ok := v.hostPort("admin.address", a.Address)
	if !ok {
		return
	}
	if !isLoopback(host) {
		v.warn("admin.address", "listen on 127.0.0.1, or let none but the monitoring reach it",
			"other machines reach %s, and the admin server has no authentication: it shows the prefixes of rules, and the IDs and states of KMS keys", a.Address)
	}
	if a.Pprof && !isLoopback(host) {
		v.report("admin.pprof", "turn it off, or listen on 127.0.0.1", "profiles are served on a loopback address only, and %s is none", a.Address)
	}
	for i, l := range listeners {
		if port != "0" && l.Address == a.Address {
			v.report("admin.address", "choose another port", "is the address of listeners[%d]", i)
		}
	}
}

func (v *validator) etcd(e *Etcd) {
	schemes := make(map[string]string)
	for i, u := range e.Endpoints {
		at := fmt.Sprintf("etcd.endpoints[%d]", i)
		if slices.Contains(e.Endpoints[:i], u) {
			v.report(at, "remove one of them", "%q is in the list twice", redactURL(u))
			continue
		}
		scheme := v.clientURL(at, u)
		if scheme == "" {
			continue
		}
		for other, first := range schemes {
			if other != scheme {
				v.report(at, "", "is of scheme %s while %s is of scheme %s: all endpoints are of one kind", scheme, first, other)
			}
		}
		if len(schemes) == 0 {
			schemes[scheme] = at
		}
	}
	overTLS := v.httpEndpoints(e)
	v.between("etcd.maxRequestBytes", e.MaxRequestBytes, 1, 1<<30, "the default is 1572864, as etcd's")
	if (e.Username == "") != (e.PasswordFile == "") {
		v.report("etcd.username", "write both or neither", "username and passwordFile: one needs the other")
	}
	if e.TLS == nil {
		return
	}
	_, cleartext := schemes["http"]
	if _, ok := schemes["https"]; len(schemes) > 0 && !ok && (!cleartext || !overTLS) {
		v.report("etcd.tls", "write https:// endpoints, or remove the block", "has no effect, because no endpoint begins with https://")
	}
	v.certPool("etcd.tls.caFile", e.TLS.CAFile)
	v.keyPair("etcd.tls", e.TLS.CertFile, e.TLS.KeyFile)
	if e.TLS.InsecureSkipVerify && (e.TLS.CAFile != "" || e.TLS.ServerName != "") {
		v.report("etcd.tls.insecureSkipVerify", "remove it: caFile and serverName say what to verify", "contradicts the rest of etcd.tls")
	}
}

// httpEndpoints checks the URLs where etcd serves HTTP, and reports whether one of them is
// https://.
func (v *validator) httpEndpoints(e *Etcd) (overTLS bool) {
	if n := len(e.HTTPEndpoints); n > 0 && n != len(e.Endpoints) {
		v.report("etcd.httpEndpoints", "write the URL of each member, in the order of etcd.endpoints", "has %d URLs for %d endpoints", n, len(e.Endpoints))
	}
	for i, u := range e.HTTPEndpoints {
		if v.clientURL(fmt.Sprintf("etcd.httpEndpoints[%d]", i), u) == "https" {
			overTLS = true
		}
	}
	return overTLS
}

func (v *validator) rules(c *Config) {
	defined := []string{Plaintext}
	for _, k := range c.KMS {
		defined = append(defined, k.Name)
	}
	seen := make(map[string]int)
	for i, r := range c.Rules {
		at := fmt.Sprintf("rules[%d]", i)
		if v.present(at + ".prefix") {
			if first, twice := seen[r.Prefix]; twice {
				v.report(at+".prefix", "remove one of them", "%q is the prefix of rules[%d] too", r.Prefix, first)
			} else {
				seen[r.Prefix] = i
			}
		}
		if r.WriteWith != "" && !slices.Contains(defined, r.WriteWith) {
			v.report(at+".writeWith", undefinedHint(defined), "no KMS provider is called %q", r.WriteWith)
		}
		for j, name := range r.ReadWith {
			at := fmt.Sprintf("%s.readWith[%d]", at, j)
			switch {
			case name == Plaintext:
				v.report(at, "allowPlaintextReads says whether plaintext may be read", "%q is not a KMS provider", name)
			case !slices.Contains(defined, name):
				v.report(at, undefinedHint(defined[1:]), "no KMS provider is called %q", name)
			case slices.Contains(r.ReadWith[:j], name):
				v.report(at, "remove one of them", "%q is in the list twice", name)
			}
		}
		v.writers(at, r, c.KMS)
		v.recovery(at, i, c.Rules, defined)
		v.oneOf(at+".onUndecryptable", r.OnUndecryptable, "error", "passthrough")
		if r.WriteWith == Plaintext && !r.AllowPlaintextReads {
			v.report(at+".allowPlaintextReads", "write true, or name a KMS provider in writeWith", "the rule writes plaintext that it may not read")
		}
	}
}

func undefinedHint(known []string) string {
	// that one is missing is a problem of its own
	known = slices.DeleteFunc(slices.Clone(known), func(name string) bool { return name == "" })
	if len(known) == 0 {
		return "define it under kms"
	}
	return "define it under kms, or use " + strings.Join(known, " or ")
}

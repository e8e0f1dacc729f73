package kubernetes

import (
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

// plainScalar is what YAML takes for a string without quotes, within brackets too.
var plainScalar = regexp.MustCompile(`^[A-Za-z/][A-Za-z0-9/._-]*$`)

func scalar(s string) string {
	if plainScalar.MatchString(s) {
		switch strings.ToLower(s) {
		case "null", "true", "false", "yes", "no", "on", "off", "y", "n":
		default:
			return s
		}
	}
	return strconv.Quote(s)
}

func scalars(list []string) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = scalar(s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// render returns the configuration. What an operator must look at is marked REPLACE.
func (v *conversion) render() []byte {
	var b bytes.Buffer
	p := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	p("# Made by etcd-kms-proxy config from-kubernetes from %q. Put in your own where it says REPLACE.\n", v.Source)
	p("apiVersion: %s\nkind: %s\n\n", config.APIVersion, config.Kind)
	p("listeners:\n# REPLACE, or keep it and give the API server --etcd-servers=unix:///run/etcd-kms-proxy/etcd.sock\n")
	p("- address: unix:///run/etcd-kms-proxy/etcd.sock\n\n")
	p("etcd:\n  # REPLACE with what the API server has in --etcd-servers. For https, add what it has in --etcd-cafile, --etcd-certfile and --etcd-keyfile:\n")
	p("  # tls: {caFile: ca.crt, certFile: client.crt, keyFile: client.key}\n  endpoints: [http://127.0.0.1:2379]\n")
	if len(v.kms)+len(v.keyFiles) > 0 || v.unfinished != "" {
		p("\nkms:\n")
	}
	if v.unfinished != "" {
		p("# REPLACE plugin with the KMS that new values are encrypted with; alibaba and local are the other kinds. The name becomes part of every value: never change it once\n")
		p("# values are encrypted with it.\n- name: %s\n  plugin: {endpoint: unix:///run/kmsplugin/%s.sock}\n", scalar(v.unfinished), config.Placeholder)
	}
	for _, k := range v.kms {
		p("# The API server's KMS v2 provider; values name it: never rename it.\n")
		p("- name: %s\n  plugin: {endpoint: %s, timeout: %v}\n", scalar(k.Name), strconv.Quote(k.Endpoint), k.Timeout)
	}
	for _, f := range v.keyFiles {
		p("# Decrypts what the API server encrypted with %s; nothing is encrypted with it.\n", f.Kind)
		p("- name: %s\n  kubernetes: {type: %s, keyFile: %s}\n", scalar(f.Provider), f.Kind, scalar(f.Path))
	}
	p("\nrules:\n")
	for _, r := range v.rules {
		for _, n := range r.notes {
			p("# NOTE: %s.\n", n)
		}
		p("- prefix: %s\n  writeWith: %s\n", scalar(r.prefix), scalar(r.writeWith))
		if len(r.readWith) > 0 {
			p("  readWith: %s\n", scalars(r.readWith))
		}
		p("  allowPlaintextReads: %t\n", r.allowPlaintext)
	}
	p("\nadmin: {address: \"127.0.0.1:9379\"}\n")
	return b.Bytes()
}

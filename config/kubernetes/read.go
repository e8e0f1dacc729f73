// Package kubernetes turns kube-apiserver's EncryptionConfiguration into a configuration of the
// proxy.
//
// [Read] is as strict as kube-apiserver and reports all problems at once, each with its line.
// [Configuration.Convert] says what the proxy makes of it, and what cannot be converted exactly.
// The package reads and writes no file: the command does. Errors never quote the file, which holds
// keys. The names of keys and providers are part of stored values anyway, so errors may contain
// them.
//
// The format, and what kube-apiserver makes of it, are those of k8s.io/apiserver v0.37
// (pkg/apis/apiserver/v1, pkg/apis/apiserver/validation, pkg/server/options/encryptionconfig).
package kubernetes

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

// Configuration is an EncryptionConfiguration.
type Configuration struct {
	Entries []Entry
}

// Entry says how some resources are stored.
type Entry struct {
	Resources []string
	Providers []Provider // the first one writes

	lines []int // of Resources
}

// Provider is one provider of an entry.
type Provider struct {
	Kind string // kms, aescbc, aesgcm, secretbox or identity
	Keys []Key  // of the kinds that hold keys
	// Of kms, which is version 2.
	Name     string
	Endpoint string // unix:///path, or unix:///@name of an abstract socket
	Timeout  time.Duration

	line int
}

// Key is a key of a provider. Its secret prints as [redacted].
type Key struct {
	Name   string
	Secret Secret
}

// Secret is the bytes of a key.
type Secret []byte

// String implements [fmt.Stringer].
func (Secret) String() string { return "[redacted]" }

// GoString implements [fmt.GoStringer].
func (Secret) GoString() string { return "[redacted]" }

// Format implements [fmt.Formatter] for every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[redacted]") }

// Read reads and checks a file, as YAML or JSON. The error is a [config.Problems].
func Read(data []byte) (*Configuration, error) {
	r := &reader{}
	c := r.document(data)
	if len(r.problems) == 0 {
		r.checkWildcards(c)
	}
	if len(r.problems) > 0 {
		slices.SortStableFunc(r.problems, func(a, b config.Problem) int { return a.Line - b.Line })
		return nil, r.problems
	}
	return c, nil
}

type reader struct{ problems config.Problems }

// report adds a problem, unless its path has one already on this line: what follows from a first
// mistake helps nobody.
func (r *reader) report(line int, at, hint, format string, args ...any) {
	if slices.ContainsFunc(r.problems, func(p config.Problem) bool { return p.Path == at && p.Line == line && at != "" }) {
		return
	}
	r.problems = append(r.problems, config.Problem{Path: at, Line: max(line, 1), Text: fmt.Sprintf(format, args...), Hint: hint})
}

var yamlLine = regexp.MustCompile(`line (\d+)`)

// errorLine returns the line that an error of the YAML library names, or 1.
func errorLine(err error) int {
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		line, _ := strconv.Atoi(m[1]) // digits
		return line
	}
	return 1
}

func (r *reader) document(data []byte) *Configuration {
	c := &Configuration{}
	const begin = `it begins with "apiVersion: apiserver.config.k8s.io/v1" and "kind: EncryptionConfiguration"`
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	if err := decoder.Decode(&doc); errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0 {
		r.report(1, "", begin, "the file is empty")
		return c
	} else if err != nil {
		r.report(errorLine(err), "", "check indentation (spaces, no tabs), quotes and colons around this line", "not YAML")
		return c
	}
	if line, err := config.SecondDocument(decoder); err != nil {
		r.report(errorLine(err), "", "check indentation (spaces, no tabs), quotes and colons around this line", "not YAML")
		return c
	} else if line > 0 {
		r.report(line, "", "kube-apiserver reads the first one only: remove the others", "a second YAML document begins here")
		return c
	}
	root := doc.Content[0]
	f := r.fields(root, "", "apiVersion", "kind", "resources")
	if f == nil {
		return c
	}
	kind, apiVersion := r.text(f["kind"], "kind"), r.text(f["apiVersion"], "apiVersion")
	if apiVersion == "v1" && kind == "EncryptionConfig" {
		r.report(root.Line, "", "write apiserver.config.k8s.io/v1 and EncryptionConfiguration; all else stays", "the form of Kubernetes 1.12 and before")
		return c
	}
	if apiVersion != "apiserver.config.k8s.io/v1" || kind != "EncryptionConfiguration" {
		r.report(root.Line, "", begin, "not an EncryptionConfiguration of apiserver.config.k8s.io/v1")
		return c
	}
	for i, n := range r.list(f["resources"], root.Line, "resources") {
		c.Entries = append(c.Entries, r.entry(n, fmt.Sprintf("resources[%d]", i)))
	}
	r.uniqueNames(c)
	return c
}

func (r *reader) entry(n *yaml.Node, at string) Entry {
	var e Entry
	f := r.fields(n, at, "resources", "providers")
	if f == nil {
		return e
	}
	for i, item := range r.list(f["resources"], n.Line, at+".resources") {
		e.lines = append(e.lines, item.Line)
		e.Resources = append(e.Resources, r.text(item, fmt.Sprintf("%s.resources[%d]", at, i)))
	}
	for i, item := range r.list(f["providers"], n.Line, at+".providers") {
		e.Providers = append(e.Providers, r.provider(item, fmt.Sprintf("%s.providers[%d]", at, i)))
	}
	r.resources(&e, at+".resources")
	return e
}

func (r *reader) provider(n *yaml.Node, at string) Provider {
	p := Provider{line: n.Line}
	f := r.fields(n, at, "aescbc", "aesgcm", "identity", "kms", "secretbox")
	if f == nil {
		return p
	}
	if len(f) != 1 {
		r.report(n.Line, at, "give it exactly one of aescbc, aesgcm, identity, kms and secretbox", "has %d providers", len(f))
		return p
	}
	for kind, body := range f {
		p.Kind = kind
		at := at + "." + kind
		switch kind {
		case "kms":
			r.kms(&p, body, at)
		case "identity":
			r.fields(body, at)
		default:
			if f := r.fields(body, at, "keys"); f != nil {
				for i, item := range r.list(f["keys"], body.Line, at+".keys") {
					p.Keys = append(p.Keys, r.key(item, fmt.Sprintf("%s.keys[%d]", at, i), kind))
				}
			}
		}
	}
	return p
}

// key reads a key of a provider of that kind.
func (r *reader) key(n *yaml.Node, at, kind string) (k Key) {
	f := r.fields(n, at, "name", "secret")
	if f == nil {
		return k
	}
	k.Name = r.text(f["name"], at+".name")
	if k.Name == "" {
		r.report(n.Line, at+".name", "", "is required")
	}
	secret, err := base64.StdEncoding.DecodeString(r.text(f["secret"], at+".secret"))
	switch {
	case err != nil:
		r.report(n.Line, at+".secret", "", "is not base64")
	case !slices.Contains(keySizes(kind), len(secret)):
		r.report(n.Line, at+".secret", fmt.Sprintf("%s takes one of %v", kind, keySizes(kind)), "has %d bytes", len(secret))
	}
	k.Secret = secret
	return k
}

func keySizes(kind string) []int {
	if kind == "secretbox" {
		return []int{32}
	}
	return []int{16, 24, 32}
}

func (r *reader) kms(p *Provider, n *yaml.Node, at string) {
	f := r.fields(n, at, "apiVersion", "cachesize", "endpoint", "name", "timeout")
	if f == nil {
		return
	}
	p.Name, p.Endpoint, p.Timeout = r.text(f["name"], at+".name"), r.text(f["endpoint"], at+".endpoint"), 3*time.Second
	switch version := r.text(f["apiVersion"], at+".apiVersion"); version {
	case "", "v1": // v1 is kube-apiserver's default
		r.report(n.Line, at, "let the API server move to a KMS v2 provider first: put one before it, rewrite every object "+
			"(kubectl get secrets -A -o json | kubectl replace -f -, and so for each resource), remove the v1 provider, and run this again",
			"KMS v1: the proxy does not read its values")
		return
	case "v2":
	default:
		r.report(n.Line, at+".apiVersion", "write v2", "is neither v1 nor v2")
		return
	}
	if f["cachesize"] != nil {
		r.report(n.Line, at+".cachesize", "remove it", "is not of v2")
	}
	if text, hint := config.CheckProviderName(p.Name); text != "" {
		if p.Name != "" {
			hint = "values name their provider, so it cannot be renamed here: have the API server write with a provider of another name first"
		}
		r.report(n.Line, at+".name", hint, "%s to the proxy", text)
	}
	if text := r.text(f["timeout"], at+".timeout"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil || d < time.Millisecond || d > 24*time.Hour {
			r.report(n.Line, at+".timeout", "write 3s, for example", "is not a duration from 1ms to 24h")
		}
		p.Timeout = d
	}
	u, err := url.Parse(p.Endpoint)
	if err != nil || u.Scheme != "unix" || u.Host != "" || !path.IsAbs(u.Path) || len(path.Clean(u.Path)) > 107 || strings.ContainsAny(u.Path, "?#%\x00") || u.RawQuery != "" ||
		// the name of an abstract socket counts as it is written
		strings.HasPrefix(u.Path, "/@") && (u.Path == "/@" || path.Clean(u.Path) != u.Path) {
		r.report(n.Line, at+".endpoint", "write unix:///path/to/socket, or unix:///@name for an abstract socket", "is not a unix socket that the proxy can reach")
		return
	}
	p.Endpoint = "unix://" + path.Clean(u.Path)
}

// uniqueNames refuses two kms providers of one name, as kube-apiserver does.
func (r *reader) uniqueNames(c *Configuration) {
	seen := map[string]int{}
	for _, e := range c.Entries {
		for _, p := range e.Providers {
			if p.Kind != "kms" || p.Name == "" {
				continue
			}
			if first := seen[p.Name]; first != 0 {
				r.report(p.line, "", "list all of its resources in one entry", "a KMS provider called %q is on line %d too", p.Name, first)
				continue
			}
			seen[p.Name] = p.line
		}
	}
}

package kubernetes

import (
	"bytes"
	"fmt"
	"path"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

// Options say what the EncryptionConfiguration does not.
type Options struct {
	// Source is the file's name, for the comment that begins the result.
	Source string
	// EtcdPrefix is kube-apiserver's --etcd-prefix. "" is its default, /registry.
	EtcdPrefix string
	// WriteWith is the provider that encrypts where the first provider of an entry is one that the
	// proxy does not write: a kms provider of the file, or the name of one to be filled in. "" is
	// the first kms provider of the same resources, and where there is none, a provider called main
	// to be filled in.
	WriteWith string
	// KeyFile returns the path of a key file, by the name of the provider that it is for. It must
	// be absolute, or relative to the configuration.
	KeyFile func(provider string) string
}

// Result is a configuration of the proxy.
type Result struct {
	// Text is the configuration, as YAML. It holds no secret.
	Text []byte
	// KeyFiles are what must stand at the paths that Text names.
	KeyFiles []KeyFile
	// Notes say where Text is not, or not exactly, what kube-apiserver does. They are in
	// Text too, as comments.
	Notes []string
	// Unfinished is the provider that Text encrypts with and that must be filled in, or "".
	Unfinished string
}

// KeyFile is the keys of a provider that only opens values.
type KeyFile struct {
	Provider string // its name in the configuration
	Kind     string // aescbc, aesgcm or secretbox
	Path     string
	Keys     []Key
}

// rule is one rule of the result.
type rule struct {
	prefix         string
	writeWith      string
	readWith       []string
	allowPlaintext bool
	notes          []string
}

type conversion struct {
	Options
	root     string // "/registry/"
	kms      []Provider
	keyFiles []KeyFile
	rules    []rule
	notes    []string // that are of no single rule
	// unfinished is the name of the provider to fill in, once a rule writes with it.
	unfinished string
}

// Convert makes a configuration of c, which [Read] has returned. It does not keep the keys of c,
// but the result's KeyFiles share them.
func (c *Configuration) Convert(o Options) (*Result, error) {
	if o.WriteWith != "" {
		if text, hint := config.CheckProviderName(o.WriteWith); text != "" {
			return nil, fmt.Errorf("the provider to write with: %s: %s", text, hint)
		}
	}
	if o.EtcdPrefix == "" {
		o.EtcdPrefix = "/registry"
	}
	v := &conversion{Options: o, root: path.Join("/", o.EtcdPrefix) + "/"}
	if v.root == "//" {
		v.root = "/"
	}
	order, providers := c.effective()
	for _, e := range c.Entries {
		for _, p := range e.Providers {
			if p.Kind == "kms" {
				v.kms = append(v.kms, p)
			}
		}
	}
	// The API server looks for the resource, then for its group, then for everything: of two that
	// store at one place, the first here counts.
	var exact, groups, all []groupResource
	for _, g := range order {
		switch {
		case g == everything:
			all = append(all, g)
		case g.resource == "*":
			groups = append(groups, g)
		default:
			exact = append(exact, g)
		}
	}
	for _, g := range slices.Concat(exact, groups, all) {
		v.add(g, providers[g])
	}
	result := &Result{KeyFiles: v.keyFiles, Unfinished: v.unfinished, Notes: slices.Clone(v.notes)}
	for _, r := range v.rules {
		result.Notes = append(result.Notes, r.notes...)
	}
	result.Text = v.render()
	return result, nil
}

// effective returns the resources in order of appearance, and the providers of each. Those of a
// resource with several entries add up.
func (c *Configuration) effective() ([]groupResource, map[groupResource][]Provider) {
	var order []groupResource
	providers := map[groupResource][]Provider{}
	for _, e := range c.Entries {
		for _, s := range e.Resources {
			g := parseResource(s)
			if providers[g] == nil {
				order = append(order, g)
			}
			providers[g] = append(providers[g], e.Providers...)
		}
	}
	return order, providers
}

// add makes the rules of g.
func (v *conversion) add(g groupResource, providers []Provider) {
	r := v.rule(g, providers)
	for i, p := range places(g) {
		one := r
		one.prefix = v.root + p.prefix
		if i > 0 {
			one.notes = nil // they were said
		}
		one.notes = slices.Clone(one.notes)
		if p.note != "" {
			one.notes = append(one.notes, p.note)
		}
		if was := v.ruleOf(one.prefix); was != nil {
			if g.resource != "*" {
				was.notes = append(was.notes, fmt.Sprintf("%q is stored here too, and has this rule instead of its own", g))
			}
			continue
		}
		v.rules = append(v.rules, one)
	}
	if g == everything && (r.writeWith != config.Plaintext || !r.allowPlaintext) {
		for i, p := range neverEncrypted {
			one := rule{prefix: v.root + p, writeWith: config.Plaintext, allowPlaintext: true}
			if i == 0 {
				one.notes = []string{"the API server keeps its own addresses and its ranges of IP addresses and ports as plaintext, with '*.*' too: so do the last rules"}
			}
			v.rules = append(v.rules, one)
		}
	}
}

func (v *conversion) ruleOf(prefix string) *rule {
	for i := range v.rules {
		if v.rules[i].prefix == prefix {
			return &v.rules[i]
		}
	}
	return nil
}

// rule says what the providers of g become, without a prefix.
func (v *conversion) rule(g groupResource, providers []Provider) (r rule) {
	var readers []string
	for _, p := range providers {
		switch p.Kind {
		case "identity":
			r.allowPlaintext = true
		case "kms":
			readers = append(readers, p.Name)
		default:
			readers = append(readers, v.staticProviders(p)...)
		}
	}
	switch first := providers[0]; first.Kind {
	case "kms":
		r.writeWith = first.Name
	case "identity":
		r.writeWith = config.Plaintext
	default:
		r.writeWith = v.writer(providers)
		r.notes = append(r.notes, fmt.Sprintf("the API server writes %s with %s, which the proxy only reads: new values are encrypted with KMS provider %q instead",
			g, first.Kind, r.writeWith))
	}
	for _, name := range readers {
		if name != r.writeWith && !slices.Contains(r.readWith, name) {
			r.readWith = append(r.readWith, name)
		}
	}
	return r
}

// writer returns the provider that encrypts in place of one that the proxy does not write.
func (v *conversion) writer(providers []Provider) string {
	if v.WriteWith == "" {
		for _, p := range providers {
			if p.Kind == "kms" {
				return p.Name
			}
		}
	} else if v.kmsCalled(v.WriteWith) {
		return v.WriteWith
	}
	v.unfinished = v.placeholder()
	return v.unfinished
}

func (v *conversion) placeholder() string {
	if v.WriteWith != "" {
		return v.WriteWith
	}
	return unused("main", v.kmsCalled)
}

func (v *conversion) kmsCalled(name string) bool {
	return slices.ContainsFunc(v.kms, func(p Provider) bool { return p.Name == name })
}

// unused returns base, or base with a number behind it that is free.
func unused(base string, taken func(string) bool) string {
	name := base
	for i := 2; taken(name); i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	return name
}

// staticProviders returns the names of the providers that decrypt what p encrypted. Equal keys are
// one provider, however often the file has them. It is more than one if p has several keys of one
// name, which kube-apiserver tries in turn.
func (v *conversion) staticProviders(p Provider) []string {
	var layers [][]Key
	for _, k := range p.Keys {
		placed := false
		for i, layer := range layers {
			at := slices.IndexFunc(layer, func(o Key) bool { return o.Name == k.Name })
			if at < 0 {
				layers[i], placed = append(layer, k), true
			} else if bytes.Equal(layer[at].Secret, k.Secret) {
				placed = true
			}
			if placed {
				break
			}
		}
		if !placed {
			layers = append(layers, []Key{k})
		}
	}
	names := make([]string, len(layers))
	for i, keys := range layers {
		names[i] = v.keyFile(p.Kind, keys)
	}
	return names
}

// keyFile returns the provider with exactly these keys, and makes it if there is none.
func (v *conversion) keyFile(kind string, keys []Key) string {
	for _, f := range v.keyFiles {
		if f.Kind == kind && slices.EqualFunc(f.Keys, keys, func(a, b Key) bool { return a.Name == b.Name && bytes.Equal(a.Secret, b.Secret) }) {
			return f.Provider
		}
	}
	name := unused("kubernetes-"+kind, func(name string) bool {
		return v.kmsCalled(name) || name == v.placeholder() || slices.ContainsFunc(v.keyFiles, func(f KeyFile) bool { return f.Provider == name })
	})
	v.keyFiles = append(v.keyFiles, KeyFile{Provider: name, Kind: kind, Path: v.KeyFile(name), Keys: keys})
	return name
}

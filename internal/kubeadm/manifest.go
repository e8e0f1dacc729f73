package kubeadm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// The flags of kube-apiserver that matter here.
const (
	flagServers   = "etcd-servers"
	flagOverrides = "etcd-servers-overrides"
)

// secretsResource is the name of Secrets in --etcd-servers-overrides: group, slash, resource. The
// name of the core group is empty.
const secretsResource = "/secrets"

// Manifest is the static Pod manifest of a kube-apiserver, as kubeadm writes it. It is immutable.
type Manifest struct {
	data []byte
	args []argument
}

// argument is an element of the container's command after the program.
type argument struct {
	text string
	line int // from 1
}

const hintManifest = "this command changes only manifests in the form that kubeadm writes; edit the file by hand, as docs/guides/kubernetes.md describes"

// unrecognized returns the error for a manifest that does not have the form that kubeadm writes.
func unrecognized(format string, args ...any) error {
	return problem.New(hintManifest, "%s", "kube-apiserver's manifest "+fmt.Sprintf(format, args...))
}

// ParseManifest reads a manifest. The error is a [problem.Problem] if the manifest does not have
// the form that kubeadm writes: it is not a Pod, it has no container or several that run
// kube-apiserver, it uses YAML that cannot be edited line by line, or --etcd-servers is missing or
// repeated. It retains data.
func ParseManifest(data []byte) (*Manifest, error) {
	d := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	if err := d.Decode(&doc); err != nil {
		return nil, unrecognized("is not YAML: %v", err)
	}
	if err := d.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, unrecognized("has more than one document")
	}
	root := doc.Content[0]
	if err := checkYAML(root); err != nil {
		return nil, err
	}
	if v, k := scalar(root, "apiVersion"), scalar(root, "kind"); v != "v1" || k != "Pod" {
		return nil, unrecognized("is not a v1 Pod, but kind %q of %q", k, v)
	}
	containers := field(field(root, "spec"), "containers")
	if containers == nil || containers.Kind != yaml.SequenceNode {
		return nil, unrecognized("has no spec.containers")
	}
	var found *yaml.Node
	for _, c := range containers.Content {
		command := field(c, "command")
		if command == nil || command.Kind != yaml.SequenceNode || len(command.Content) == 0 || command.Content[0].Value != "kube-apiserver" {
			continue
		}
		if found != nil {
			return nil, unrecognized("has two containers whose command is kube-apiserver")
		}
		if field(c, "args") != nil {
			return nil, unrecognized("has args besides the container's command")
		}
		found = command
	}
	if found == nil {
		return nil, unrecognized("has no container whose command is kube-apiserver")
	}
	if found.Style&yaml.FlowStyle != 0 {
		return nil, unrecognized("has its command on one line, and not one argument a line")
	}
	m := &Manifest{data: data}
	for _, n := range found.Content[1:] {
		if n.Kind != yaml.ScalarNode {
			return nil, unrecognized("has something else than text among its arguments, in line %d", n.Line)
		}
		m.args = append(m.args, argument{n.Value, n.Line})
	}
	return m, m.check()
}

// checkYAML refuses YAML in which a change of one line may change other values, or which YAML
// libraries read differently: anchors, aliases, merge keys and repeated keys.
func checkYAML(n *yaml.Node) error {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		return unrecognized("has a YAML anchor or alias in line %d", n.Line)
	}
	if n.Kind == yaml.MappingNode {
		seen := make(map[string]bool)
		for i := 0; i < len(n.Content); i += 2 {
			key := n.Content[i].Value
			if seen[key] {
				return unrecognized("has the field %q twice, in line %d", key, n.Content[i].Line)
			}
			seen[key] = true
		}
	}
	for _, c := range n.Content {
		if err := checkYAML(c); err != nil {
			return err
		}
	}
	return nil
}

// field returns the value of a mapping's field, or nil.
func field(n *yaml.Node, name string) *yaml.Node {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return n.Content[i+1]
		}
	}
	return nil
}

func scalar(n *yaml.Node, name string) string {
	if v := field(n, name); v != nil && v.Kind == yaml.ScalarNode {
		return v.Value
	}
	return ""
}

// check refuses flags that do not have the form that kubeadm writes.
func (m *Manifest) check() error {
	count := make(map[string]int)
	for _, a := range m.args {
		name, _, ok := split(a.text)
		if name == flagServers || name == flagOverrides {
			if !ok {
				return unrecognized("has --%s without an equals sign and a value, in line %d", name, a.line)
			}
			if !strings.HasPrefix(a.text, "--"+name+"=") {
				return unrecognized("spells --%s with underscores, in line %d", name, a.line)
			}
			if err := m.checkOneLine(a); err != nil {
				return err
			}
		}
		count[name]++
	}
	if count[flagServers] == 0 {
		return unrecognized("has no --%s", flagServers)
	}
	for _, name := range []string{flagServers, flagOverrides} {
		if count[name] > 1 {
			return unrecognized("has --%s %d times", name, count[name])
		}
	}
	return nil
}

// checkOneLine refuses an argument that is not verbatim on a line of its own.
func (m *Manifest) checkOneLine(a argument) error {
	if line := string(m.line(a.line)); strings.Count(line, a.text) != 1 || strings.Count(line, "--") != 1 {
		return unrecognized("has an argument that is escaped, or shares line %d with another", a.line)
	}
	return nil
}

// split returns the name and the value of an argument such as --name=value. As in kube-apiserver,
// underscores in the name count as dashes. ok is false if there is no value.
func split(arg string) (name, value string, ok bool) {
	if !strings.HasPrefix(arg, "--") {
		return "", "", false
	}
	name, value, ok = strings.Cut(arg[2:], "=")
	return strings.ReplaceAll(name, "_", "-"), value, ok
}

// Flag returns the value of a flag, the last one if it is repeated, or "".
func (m *Manifest) Flag(name string) string {
	value := ""
	for _, a := range m.args {
		if n, v, ok := split(a.text); ok && n == name {
			value = v
		}
	}
	return value
}

// EtcdServers returns the URLs of --etcd-servers.
func (m *Manifest) EtcdServers() []string { return strings.Split(m.Flag(flagServers), ",") }

// SecretsServers returns the URLs that --etcd-servers-overrides names for Secrets, or nil.
func (m *Manifest) SecretsServers() []string {
	for _, o := range m.overrides() {
		if servers, ok := strings.CutPrefix(o, secretsResource+"#"); ok {
			return strings.Split(servers, ";")
		}
	}
	return nil
}

func (m *Manifest) overrides() []string {
	if v := m.Flag(flagOverrides); v != "" {
		return strings.Split(v, ",")
	}
	return nil
}

// Bytes returns the content of the file. The caller must not change it.
func (m *Manifest) Bytes() []byte { return m.data }

// WithEtcdServers returns the manifest with other URLs in --etcd-servers.
func (m *Manifest) WithEtcdServers(urls []string) (*Manifest, error) {
	return m.set(flagServers, strings.Join(urls, ","))
}

// WithSecretsServers returns the manifest with an override of the servers for Secrets. Without
// urls, it removes the override.
func (m *Manifest) WithSecretsServers(urls []string) (*Manifest, error) {
	rest := slices.DeleteFunc(m.overrides(), func(o string) bool { return strings.HasPrefix(o, secretsResource+"#") })
	if len(urls) > 0 {
		rest = append(rest, secretsResource+"#"+strings.Join(urls, ";"))
	}
	return m.set(flagOverrides, strings.Join(rest, ","))
}

// set changes a flag's value. It adds a missing flag below --etcd-servers, and removes the flag if
// value is empty. All other bytes of the file stay unchanged.
func (m *Manifest) set(name, value string) (*Manifest, error) {
	at := slices.IndexFunc(m.args, func(a argument) bool { n, _, _ := split(a.text); return n == name })
	want := make([]string, 0, len(m.args)+1)
	for _, a := range m.args {
		want = append(want, a.text)
	}
	text := "--" + name + "=" + value
	var data []byte
	switch {
	case at < 0 && value == "":
		return m, nil
	case at < 0:
		below := slices.IndexFunc(m.args, func(a argument) bool { n, _, _ := split(a.text); return n == flagServers })
		model := m.args[below]
		line := m.line(model.line)
		data = m.replace(model.line, append(slices.Clone(line), bytes.Replace(line, []byte(model.text), []byte(text), 1)...))
		want = slices.Insert(want, below+1, text)
	case value == "":
		data = m.replace(m.args[at].line, nil)
		want = slices.Delete(want, at, at+1)
	default:
		data = m.replace(m.args[at].line, bytes.Replace(m.line(m.args[at].line), []byte(m.args[at].text), []byte(text), 1))
		want[at] = text
	}
	// Parse the result, to verify that it has exactly the intended arguments.
	n, err := ParseManifest(data)
	if err != nil {
		return nil, err
	}
	if !slices.EqualFunc(n.args, want, func(a argument, w string) bool { return a.text == w }) {
		return nil, unrecognized("cannot be changed in line %d alone", m.args[max(at, 0)].line)
	}
	return n, nil
}

// line returns a line of the file, with its line end.
func (m *Manifest) line(n int) []byte {
	start, end := m.span(n)
	return m.data[start:end]
}

// replace returns the content of the file with one line replaced by text.
func (m *Manifest) replace(n int, text []byte) []byte {
	start, end := m.span(n)
	return slices.Concat(m.data[:start], text, m.data[end:])
}

func (m *Manifest) span(n int) (start, end int) {
	for range n - 1 {
		i := bytes.IndexByte(m.data[start:], '\n')
		if i < 0 {
			return len(m.data), len(m.data)
		}
		start += i + 1
	}
	if i := bytes.IndexByte(m.data[start:], '\n'); i >= 0 {
		return start, start + i + 1
	}
	return start, len(m.data)
}

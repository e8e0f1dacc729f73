package kubernetes

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// isPlain reports whether n is neither an alias nor has an anchor, which the reader does not
// follow. If it is not, it reports a problem.
func (r *reader) isPlain(n *yaml.Node, at string) bool {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		r.report(n.Line, at, "write the value out", "anchors and aliases are not supported")
		return false
	}
	return true
}

// fields returns the fields of a mapping, or nil if it reported that n is not a mapping of known
// fields. It reports an unknown field without its name, which may be a misplaced secret, and
// nothing else about the mapping.
func (r *reader) fields(n *yaml.Node, at string, known ...string) map[string]*yaml.Node {
	if !r.isPlain(n, at) {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		r.report(n.Line, at, fieldsHint(known), "is not a mapping of fields")
		return nil
	}
	f, ok := make(map[string]*yaml.Node), true
	for i := 0; i+1 < len(n.Content); i += 2 {
		name, value := n.Content[i], n.Content[i+1]
		switch {
		case name.Kind != yaml.ScalarNode || !slices.Contains(known, name.Value):
			r.report(name.Line, at, fieldsHint(known), "has an unknown field on this line")
			ok = false
		case f[name.Value] != nil:
			r.report(name.Line, at+"."+name.Value, "remove one of them", "is given twice")
		default:
			f[name.Value] = value
		}
	}
	if !ok {
		return nil
	}
	return f
}

func fieldsHint(known []string) string {
	if len(known) == 0 {
		return "write {}"
	}
	return "the fields here are " + strings.Join(known, ", ")
}

// list returns the elements of a list that has some. line is where it should be if n is nil.
func (r *reader) list(n *yaml.Node, line int, at string) []*yaml.Node {
	if n == nil {
		r.report(line, at, "", "is required")
		return nil
	}
	if !r.isPlain(n, at) {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		r.report(n.Line, at, `write a list: "- " before each element, or [a, b]`, "is not a list")
		return nil
	}
	if len(n.Content) == 0 {
		r.report(n.Line, at, "", "is empty")
	}
	return n.Content
}

// text returns a string; that of nil is empty.
func (r *reader) text(n *yaml.Node, at string) string {
	if n == nil || !r.isPlain(n, at) {
		return ""
	}
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" && n.ShortTag() != "!!null" {
		r.report(n.Line, at, "put it in quotes", "is not a string")
		return ""
	}
	if n.ShortTag() == "!!null" {
		return ""
	}
	return n.Value
}

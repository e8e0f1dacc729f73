package config

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// decoder fills the types from YAML nodes. yaml.v3's own strict mode stops at the first problems
// and knows no paths; this one continues, and remembers the line of every field for the checks that
// follow.
//
// Struct tags: yaml is the field's name. default is its value when absent, written as in YAML.
// required "true" is neither absent nor empty, "present" is not absent. file "true" names a file,
// which must be readable, and create the command that makes it. binary "true" may also have the tag
// !!binary and be base64.
type decoder struct {
	checker
	data []byte // the file

	kmsFilesMayMiss bool // see [Checks]
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// document decodes data into c. It reports false if there is nothing that further checks could look
// at.
func (d *decoder) document(c *Config) bool {
	dec := yaml.NewDecoder(bytes.NewReader(d.data))
	var doc yaml.Node
	err := dec.Decode(&doc)
	if errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 0 {
		d.report("", `begin with "apiVersion: `+APIVersion+`" and "kind: `+Kind+`"; docs/reference/configuration.md has an example`, "the file is empty")
		return false
	}
	if err == nil {
		var line int
		if line, err = SecondDocument(dec); line > 0 {
			d.lines[""] = line
			d.report("", "keep one document in the file", "a second document begins here")
			return false
		}
	}
	if err != nil {
		text := err.Error()
		if m := yamlLine.FindStringSubmatch(text); m != nil {
			if n, err := strconv.Atoi(m[1]); err == nil {
				d.lines[""] = n
			}
			text = text[len(m[0]):]
		}
		d.report("", "check indentation (spaces, no tabs), quotes and colons around this line", "not YAML: %s", text)
		return false
	}
	root := doc.Content[0]
	d.lines[""] = root.Line
	if root.Kind != yaml.MappingNode {
		d.report("", `begin with "apiVersion: `+APIVersion+`"`, "the file is %s, not a mapping of fields", kindOf(root))
		return false
	}
	d.value(root, reflect.ValueOf(c).Elem(), "", "")
	return true
}

// SecondDocument reads what follows the first document of a YAML file. It returns the line on which
// another document with content begins, and 0 if there is none: a trailing "---", with or without
// comments, begins an empty one.
func SecondDocument(dec *yaml.Decoder) (line int, err error) {
	for {
		var next yaml.Node
		switch err := dec.Decode(&next); {
		case errors.Is(err, io.EOF):
			return 0, nil
		case err != nil:
			return 0, err
		}
		for _, root := range next.Content {
			if root.Kind != yaml.ScalarNode || root.Value != "" || root.Style != 0 {
				return next.Line, nil
			}
		}
	}
}

// value decodes n into v. tag is the tag of the field that v is, or holds v in a list.
func (d *decoder) value(n *yaml.Node, v reflect.Value, path string, tag reflect.StructTag) {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		d.report(path, "write the value out", "anchors and aliases are not supported")
		return
	}
	if n.ShortTag() == "!!null" {
		d.report(path, "give it a value, or remove the line", "has no value")
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	switch v.Kind() {
	case reflect.Struct:
		d.object(n, v, path)
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			d.report(path, `write a list: "- " before each element, or [a, b]`, "is %s, not a list", kindOf(n))
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, e := range n.Content {
			at := fmt.Sprintf("%s[%d]", path, i)
			d.lines[at] = e.Line
			d.value(e, v.Index(i), at, tag)
		}
	case reflect.Map:
		d.stringMap(n, v, path)
	default:
		if n.Kind != yaml.ScalarNode {
			d.report(path, "", "is %s, not %s", kindOf(n), typeName(v.Type()))
			return
		}
		value, kind := n.Value, n.ShortTag()
		if tag.Get("binary") != "" && kind == "!!binary" {
			b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(value), ""))
			if err != nil {
				d.report(path, "", "has the tag !!binary and is not base64")
				return
			}
			value, kind = string(b), "!!str"
		}
		if err := setScalar(v, value, kind); err != nil {
			hint := ""
			if v.Kind() == reflect.String {
				hint = "put it in quotes"
			}
			d.report(path, hint, "%v", err)
			return
		}
		if tag.Get("binary") != "" {
			d.escapedBytes(n, path)
		}
		if tag.Get("file") != "" && v.String() != "" {
			if !filepath.IsAbs(v.String()) {
				v.SetString(filepath.Join(d.dir, v.String()))
			}
			if _, err := d.read(v.String()); err != nil && (!d.kmsFilesMayMiss || !strings.HasPrefix(path, "kms[")) {
				hint := "check the name and that the user the proxy runs as may read it"
				if create := tag.Get("create"); create != "" && errors.Is(err, fs.ErrNotExist) {
					hint = "check the name, or create the file: " + create + " " + v.String()
				}
				d.report(path, hint, "%s", fileError(err))
			}
		}
	}
}

// byteEscape matches a double-quoted string up to its first escape such as \xff that is not ASCII.
var byteEscape = regexp.MustCompile(`(?s)^"(?:[^"\\]|\\[^x]|\\x[0-7][0-9A-Fa-f])*\\x([89A-Fa-f][0-9A-Fa-f])`)

// escapedBytes warns of a string that was written with escapes such as "\xff": YAML takes them for
// the characters of those numbers, which are two bytes each in UTF-8.
func (d *decoder) escapedBytes(n *yaml.Node, path string) {
	if n.Style&yaml.DoubleQuotedStyle == 0 {
		return
	}
	lines := bytes.SplitAfter(d.data, []byte{'\n'})
	if n.Line > len(lines) || n.Column > len(lines[n.Line-1]) {
		return
	}
	m := byteEscape.FindSubmatch(bytes.Join(lines[n.Line-1:], nil)[n.Column-1:])
	if m == nil {
		return
	}
	b, _ := strconv.ParseUint(string(m[1]), 16, 8) // two hexadecimal digits
	meant := make([]byte, 0, len(n.Value))
	for _, r := range n.Value {
		if r >= 0x80 && r <= 0xff {
			meant = append(meant, byte(r))
		} else {
			meant = utf8.AppendRune(meant, r)
		}
	}
	d.warn(path, "to mean the byte, write "+path[strings.LastIndexByte(path, '.')+1:]+": !!binary "+base64.StdEncoding.EncodeToString(meant),
		"\\x%02x is the character U+%04X to YAML, of the bytes % X in UTF-8, and not the byte %02X", b, b, []byte(string(rune(b))), b)
}

// object decodes a mapping into the fields of a struct.
func (d *decoder) object(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		d.report(path, "", "is %s, not a mapping of fields", kindOf(n))
		return
	}
	setDefaults(v)
	fields := make(map[string]reflect.StructField)
	for f := range v.Type().Fields() {
		fields[f.Tag.Get("yaml")] = f
	}
	for key, value := range d.entries(n, path, "a field's name") {
		at := join(path, key.Value)
		f, ok := fields[key.Value]
		if !ok {
			d.reportAt(key.Line, at, suggest(key.Value, slices.Sorted(maps.Keys(fields))), "unknown field")
			continue
		}
		d.lines[at] = key.Line
		d.value(value, v.FieldByIndex(f.Index), at, f.Tag)
	}
	for f := range v.Type().Fields() {
		at, need := join(path, f.Tag.Get("yaml")), f.Tag.Get("required")
		switch {
		case need == "":
		case !d.present(at):
			d.report(at, "add "+f.Tag.Get("yaml")+"; docs/reference/configuration.md says what it means", "is required")
		case need == "true" && isEmpty(v.FieldByIndex(f.Index)):
			d.report(at, "", "is empty")
		}
	}
}

func (d *decoder) stringMap(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		d.report(path, "", "is %s, not a mapping of strings", kindOf(n))
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	for key, value := range d.entries(n, path, "a name") {
		at := join(path, key.Value)
		d.lines[at] = key.Line
		s := reflect.New(v.Type().Elem()).Elem()
		d.value(value, s, at, "")
		v.SetMapIndex(reflect.ValueOf(key.Value), s)
	}
}

// entries yields the names and values of a mapping. It reports a name that is not a string, which
// what describes, and a name that is given twice.
func (d *decoder) entries(n *yaml.Node, path, what string) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(key, value *yaml.Node) bool) {
		lines := make(map[string]int)
		for i := 0; i+1 < len(n.Content); i += 2 {
			key := n.Content[i]
			if key.Kind != yaml.ScalarNode {
				d.reportAt(key.Line, path, "", "%s is %s, not a string", what, kindOf(key))
				continue
			}
			if first, twice := lines[key.Value]; twice {
				d.reportAt(key.Line, join(path, key.Value), "remove one of them", "is given twice, first on line %d", first)
				continue
			}
			lines[key.Value] = key.Line
			if !yield(key, n.Content[i+1]) {
				return
			}
		}
	}
}

// setDefaults fills the fields of a struct from their tags, and those of the structs in it. What a
// pointer or a list holds gets its defaults when it is decoded.
func setDefaults(v reflect.Value) {
	for f := range v.Type().Fields() {
		at := v.FieldByIndex(f.Index)
		if at.Kind() == reflect.Struct {
			setDefaults(at)
		} else if text, ok := f.Tag.Lookup("default"); ok {
			tag := "!!str"
			switch at.Kind() {
			case reflect.Bool:
				tag = "!!bool"
			case reflect.Int, reflect.Int64:
				tag = "!!int"
			}
			if err := setScalar(at, text, tag); err != nil {
				panic(fmt.Sprintf("config: default of %s: %v", f.Name, err))
			}
		}
	}
}

var durationType = reflect.TypeFor[time.Duration]()

// setScalar sets v to the YAML scalar text, which YAML resolved to tag.
func setScalar(v reflect.Value, text, tag string) error {
	switch {
	case v.Type() == durationType:
		x, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%q is not a duration such as 90s, 1m or 24h", text)
		}
		v.SetInt(int64(x))
	case v.Kind() == reflect.String:
		// Numbers are taken as they are written, so that "mode: 0600" and "minVersion: 1.2" mean
		// what they say.
		if tag != "!!str" && tag != "!!int" && tag != "!!float" && tag != "!!timestamp" {
			return fmt.Errorf("%q is %s to YAML, not a string", text, strings.TrimPrefix(tag, "!!"))
		}
		v.SetString(text)
	case v.Kind() == reflect.Bool:
		if tag != "!!bool" || text != "true" && text != "false" {
			return fmt.Errorf("%q is neither true nor false", text)
		}
		v.SetBool(text == "true")
	default:
		x, err := strconv.ParseInt(text, 10, v.Type().Bits())
		if tag != "!!int" || err != nil {
			return fmt.Errorf("%q is not a whole number that fits", text)
		}
		v.SetInt(x)
	}
	return nil
}

func isEmpty(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.Slice, reflect.String, reflect.Map:
		return v.Len() == 0
	default:
		return false
	}
}

var plainName = regexp.MustCompile(`^[A-Za-z0-9_./-]+$`)

// join returns the path of a field. Whatever a file calls a field, the path prints as one line.
func join(path, name string) string {
	if !plainName.MatchString(name) {
		name = strconv.Quote(name)
	}
	if path == "" {
		return name
	}
	return path + "." + name
}

func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	default:
		return "a single value"
	}
}

func typeName(t reflect.Type) string {
	switch {
	case t == durationType:
		return "a duration"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.String:
		return "a string"
	default:
		return "a number"
	}
}

// suggest names the field that was probably meant, or all there are.
func suggest(got string, known []string) string {
	best, least := "", min(3, (len(got)+1)/2) // fewer than half of the letters differ
	for _, k := range known {
		if n := distance(strings.ToLower(got), strings.ToLower(k)); n < least {
			best, least = k, n
		}
	}
	if best != "" {
		return fmt.Sprintf("did you mean %s?", best)
	}
	return "the fields here are " + strings.Join(known, ", ")
}

// distance is the number of letters to insert, delete or change to get from a to b.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

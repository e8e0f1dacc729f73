// Command gendoc writes docs/reference/configuration.md from the comments and struct tags of the
// types of package config.
//
// The types are printed in the order in which [root] reaches them, each with the path that its
// fields have in the file.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"strings"
)

// root is the type of the whole file.
const root = "Config"

func main() {
	types := flag.String("types", "", "comma-separated Go `files` with the types")
	example := flag.String("example", "", "YAML `file` to show as the example")
	out := flag.String("out", "", "Markdown `file` to write")
	flag.Parse()
	page, err := render(strings.Split(*types, ","), *example)
	if err == nil {
		err = os.WriteFile(*out, page, 0o644) //nolint:gosec // documentation is for everyone to read
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(3)
	}
}

// render returns the page. Its errors are those of files, and of a type or field without a comment.
func render(types []string, example string) ([]byte, error) {
	files := token.NewFileSet()
	var parsed []*ast.File
	for _, name := range types {
		f, err := parser.ParseFile(files, name, nil, parser.ParseComments)
		if err != nil {
			return nil, fmt.Errorf("parse types: %w", err)
		}
		parsed = append(parsed, f)
	}
	pkg, err := doc.NewFromFiles(files, parsed, "config")
	if err != nil {
		return nil, fmt.Errorf("read comments: %w", err)
	}
	p := page{types: make(map[string]*doc.Type)}
	for _, t := range pkg.Types {
		p.types[t.Name] = t
	}
	sample, err := os.ReadFile(example) //nolint:gosec // named by the go:generate line
	if err != nil {
		return nil, fmt.Errorf("read example: %w", err)
	}
	p.printf("<!-- Generated from the comments in config/types*.go by `make docs`; do not edit. -->\n\n# Configuration\n\n")
	p.printf("Every field of the configuration file. For operators who write or review it; ")
	p.printf("[Configure the proxy](../guides/configure.md) begins with a small one.\n\n")
	p.printf("`etcd-kms-proxy config check --config FILE` checks a file and reports every problem at once, with its path, its line and a hint. ")
	p.printf("A field that is not described here, or that is given twice, is a problem.\n\n")
	p.printf("## Example\n\n```yaml\n%s```\n\n", sample)
	if err := p.object(root, ""); err != nil {
		return nil, err
	}
	p.printf("%s", reload)
	return p.Bytes(), nil
}

// reload is the part of the page that belongs to no type.
const reload = `## Reload

` + "`serve`" + ` reads the file again when it changes and on SIGHUP. Rules, the log
level, and the allowedClients and ciphertextClients of listeners apply at once. The log names other
changes, which need a restart. A file with a problem changes nothing. Certificates, keys and
credentials are read again when their files change.

A reload that would protect keys less is refused as a whole: a rule removed or narrowed,
` + "`writeWith: plaintext`" + ` where values were encrypted, or ` + "`allowPlaintextReads`" + ` back on. The log
names the rule. ` + "`serve --allow-weakening`" + ` allows it. A restart with such a file is refused too: see
[Restrict who can change encryption settings](../guides/restrict-settings.md).

## Core dumps

On Linux, every command turns off core dumps of its own process and makes its memory unreadable to
other processes of the same user (RLIMIT_CORE 0 and PR_SET_DUMPABLE 0), because its memory contains
DEK seeds and values. Turn swap off, or encrypt it.
`

// page is the Markdown that has been written.
type page struct {
	bytes.Buffer
	types map[string]*doc.Type
}

func (p *page) printf(format string, args ...any) { fmt.Fprintf(p, format, args...) }

// object prints a type whose fields stand at path, and then the types of its fields.
func (p *page) object(name, path string) error {
	t := p.types[name]
	if t == nil {
		return fmt.Errorf("type %s is in none of the files", name)
	}
	if t.Doc == "" {
		return fmt.Errorf("type %s has no comment", name)
	}
	fields := t.Decl.Specs[0].(*ast.TypeSpec).Type.(*ast.StructType).Fields.List
	if path == "" {
		p.printf("## The file\n\n")
	} else {
		p.printf("## `%s`\n\n", path)
	}
	p.printf("%s\n\n", sentence(t.Doc, name, "`"+path+"`"))
	type inner struct{ name, path string }
	var below []inner
	for _, f := range fields {
		tag := reflect.StructTag(strings.Trim(f.Tag.Value, "`"))
		key := tag.Get("yaml")
		if f.Doc.Text() == "" {
			return fmt.Errorf("%s.%s has no comment", name, f.Names[0])
		}
		kind, ref, list := typeOf(f.Type)
		notes := []string{kind}
		if tag.Get("file") != "" {
			notes[0] = "file name"
		}
		if tag.Get("required") != "" {
			notes = append(notes, "required")
		}
		if def, ok := tag.Lookup("default"); ok {
			notes = append(notes, "default `"+def+"`")
		}
		p.printf("- %s *(%s)*\n", sentence(f.Doc.Text(), f.Names[0].Name, "**`"+key+"`**"), strings.Join(notes, ", "))
		if ref != "" {
			at := strings.TrimPrefix(path+"."+key, ".")
			if list {
				at += "[]"
			}
			below = append(below, inner{ref, at})
		}
	}
	p.printf("\n")
	for _, b := range below {
		if err := p.object(b.name, b.path); err != nil {
			return err
		}
	}
	return nil
}

var blanks = regexp.MustCompile(`\s*\n\s*`)

// sentence joins a comment's lines within each paragraph and calls the thing by the name it has in
// the file.
func sentence(text, name, shown string) string {
	paragraphs := strings.Split(strings.TrimSpace(text), "\n\n")
	for i, s := range paragraphs {
		paragraphs[i] = blanks.ReplaceAllString(s, " ")
	}
	s := strings.Join(paragraphs, "\n\n")
	if rest, ok := strings.CutPrefix(s, name+" "); ok && shown != "``" {
		return shown + " " + rest
	}
	return strings.Replace(s, name+" is the whole file.", "The blocks of the file.", 1)
}

// typeOf returns what a field's type is called for people, and the struct type that it refers to,
// if any.
func typeOf(e ast.Expr) (kind, ref string, list bool) {
	switch t := e.(type) {
	case *ast.StarExpr:
		return typeOf(t.X)
	case *ast.ArrayType:
		kind, ref, _ := typeOf(t.Elt)
		if ref != "" {
			kind = "object"
		}
		return "list of " + kind + "s", ref, true
	case *ast.MapType:
		return "mapping of strings", "", false
	case *ast.SelectorExpr:
		return "duration", "", false
	case *ast.Ident:
		switch t.Name {
		case "string":
			return "string", "", false
		case "bool":
			return "boolean", "", false
		case "int", "int64":
			return "number", "", false
		}
		return "object", t.Name, false
	}
	return fmt.Sprintf("%T", e), "", false
}

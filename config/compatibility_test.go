package config

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

var updateReleased = flag.Bool("update-released", false, "write what the configurations of testdata/0.1.0 mean again: only before 0.1.0 is released")

// TestConfigurationsOfReleases loads what was a configuration of 0.1.0: one with every field that
// there was, and one that leaves as much as it can to the defaults. Both mean what they meant,
// field by field. RELEASING.md promises that, so the files of a release never change.
func TestConfigurationsOfReleases(t *testing.T) {
	cert, key := pair(t)
	revoked, folder := crl(t, cert, key), t.TempDir()
	read := func(path string) ([]byte, error) {
		switch filepath.Ext(path) {
		case ".crt":
			return cert, nil
		case ".key":
			return key, nil
		case ".pem":
			return revoked, nil
		}
		return []byte("text"), nil
	}
	for _, name := range []string{"minimal", "full"} {
		file := filepath.Join("testdata", "0.1.0", name)
		data, err := os.ReadFile(file + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		c, err := parse(data, folder, read, Checks{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		text, err := json.MarshalIndent(c, "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.ReplaceAll(text, []byte(folder), []byte("FOLDER"))
		if *updateReleased {
			if err := os.WriteFile(file+".json", append(text, '\n'), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		golden, err := os.ReadFile(file + ".json")
		if err != nil {
			t.Fatal(err)
		}
		var want, got any
		if err := json.Unmarshal(golden, &want); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, known(want, got)); diff != "" {
			t.Errorf("%s means something else (-0.1.0 +now):\n%s", name, diff)
		}
	}
}

// known is got without the fields that want does not have: later versions may add some.
func known(want, got any) any {
	switch w := want.(type) {
	case map[string]any:
		if g, ok := got.(map[string]any); ok {
			kept := make(map[string]any)
			for name := range w {
				if v, ok := g[name]; ok {
					kept[name] = known(w[name], v)
				}
			}
			return kept
		}
	case []any:
		if g, ok := got.([]any); ok && len(g) == len(w) {
			kept := make([]any, len(g))
			for i := range g {
				kept[i] = known(w[i], g[i])
			}
			return kept
		}
	}
	return got
}

// TestFullConfiguration keeps the full configuration of 0.1.0 full: it has each field of the types.
// A field that is added after that release goes into newer, with the version that has it.
func TestFullConfiguration(t *testing.T) {
	newer := map[string]string{}
	data, err := os.ReadFile("testdata/0.1.0/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var document yaml.Node
	if err := yaml.Unmarshal(data, &document); err != nil {
		t.Fatal(err)
	}
	set := make(map[string]bool)
	var walk func(path string, n *yaml.Node)
	walk = func(path string, n *yaml.Node) {
		switch n.Kind {
		case yaml.DocumentNode, yaml.SequenceNode:
			for _, e := range n.Content {
				walk(path, e)
			}
		case yaml.MappingNode:
			for i := 0; i < len(n.Content); i += 2 {
				at := strings.TrimPrefix(path+"."+n.Content[i].Value, ".")
				set[at] = true
				walk(at, n.Content[i+1])
			}
		}
	}
	walk("", &document)
	fields := 0
	var check func(path string, typ reflect.Type)
	check = func(path string, typ reflect.Type) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct {
			return
		}
		for f := range typ.Fields() {
			at := strings.TrimPrefix(path+"."+f.Tag.Get("yaml"), ".")
			fields++
			if _, later := newer[at]; !later && !set[at] {
				t.Errorf("the full configuration has no %s", at)
			}
			check(at, f.Type)
		}
	}
	check("", reflect.TypeFor[Config]())
	if fields < 80 {
		t.Errorf("only %d fields were looked at", fields)
	}
}

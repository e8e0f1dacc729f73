package config

import (
	"os"
	"strings"
	"testing"
)

// TestPrefixBytes: an escape that YAML takes for a character is warned of, and bytes can be
// written.
func TestPrefixBytes(t *testing.T) {
	data, err := os.ReadFile("testdata/prefix-bytes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const head = "apiVersion: etcd-kms-proxy.io/v1alpha1\nkind: ProxyConfiguration\nlisteners: [{address: unix:///a}]\netcd: {endpoints: [http://127.0.0.1:1]}\nkms: [{name: main, plugin: {endpoint: unix:///b}}]\n"
	rule := func(prefix string) string { return "rules:\n- prefix: " + prefix + "\n  writeWith: main\n" }
	for name, c := range map[string]struct {
		rules, prefix string
		warning, hint string // "" for none
	}{
		"case":                {string(data), "\u00ff", `\xff is the character U+00FF to YAML, of the bytes C3 BF in UTF-8, and not the byte FF`, "prefix: !!binary /w=="},
		"a letter first":      {rule(`"A\xe9B"`), "A\u00e9B", `\xe9 is the character U+00E9 to YAML, of the bytes C3 A9`, "prefix: !!binary QelC"},
		"flow":                {"rules: [{writeWith: main, prefix: \"\\x80\"}]\n", "\u0080", `\x80 is the character U+0080`, "!!binary gA=="},
		"more lines":          {rule("\"/a\\\n    \\xff\""), "/a\u00ff", `\xff is the character`, "!!binary L2H/"},
		"ASCII":               {rule(`"\x41"`), "A", "", ""},
		"backslash":           {rule(`"\\xff"`), `\xff`, "", ""},
		"single quotes":       {rule(`'\xff'`), `\xff`, "", ""},
		"plain":               {rule(`\xff`), `\xff`, "", ""},
		"Unicode escape":      {rule(`"\u00ff"`), "\u00ff", "", ""},
		"a letter":            {rule(`"größe"`), "größe", "", ""},
		"another field":       {rule("\"/a/\" # \"\\xff\""), "/a/", "", ""},
		"binary":              {rule(`!!binary /0E=`), "\xffA", "", ""},
		"binary, quoted":      {rule(`!!binary "/0E="`), "\xffA", "", ""},
		"binary, more lines":  {rule("!!binary |\n    /0\n    E="), "\xffA", "", ""},
		"binary, text inside": {rule(`!!binary L2Ev`), "/a/", "", ""},
	} {
		var warnings []Problem
		cfg, err := parse([]byte(head+c.rules), t.TempDir(), os.ReadFile, Checks{Warn: func(p Problem) { warnings = append(warnings, p) }})
		if err != nil || cfg.Rules[0].Prefix != c.prefix {
			t.Errorf("%s: %+v, %v", name, cfg, err)
			continue
		}
		switch {
		case c.warning == "" && len(warnings) > 0:
			t.Errorf("%s: %v", name, warnings)
		case c.warning != "" && (len(warnings) != 1 || !strings.Contains(warnings[0].Text, c.warning) || !strings.Contains(warnings[0].Hint, c.hint) ||
			warnings[0].Path != "rules[0].prefix" || warnings[0].Line == 1):
			t.Errorf("%s: %+v", name, warnings)
		}
	}
	for text, want := range map[string]string{
		rule("!!binary '%'"):                          "line 7: rules[0].prefix: has the tag !!binary and is not base64",
		rule("a") + "log: {level: !!binary aW5mbw==}": "is binary to YAML, not a string",
	} {
		if _, err := parse([]byte(head+text), t.TempDir(), os.ReadFile, Checks{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// TestTrailingDocument: a last "---" begins an empty document, which is none.
func TestTrailingDocument(t *testing.T) {
	const text = "---\napiVersion: etcd-kms-proxy.io/v1alpha1\nkind: ProxyConfiguration\nlisteners: [{address: unix:///a}]\netcd: {endpoints: [http://127.0.0.1:1]}\n"
	for end, good := range map[string]bool{
		"": true, "---": true, "---\n": true, "---\n# a comment\n": true, "---\n---\n": true, "...\n": true, "---\n...\n": true,
		"---\na: b\n": false, "---\n---\n[]\n": false, "---\n''\n": false, "---\n\t\n": false,
	} {
		if _, err := parse([]byte(text+end), t.TempDir(), os.ReadFile, Checks{}); (err == nil) != good {
			t.Errorf("%q: %v", end, err)
		}
	}
}

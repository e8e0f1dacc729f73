package docs

import (
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

func readPage(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestLinks requires that each link within the repository leads to a file, and its anchor to a
// heading.
func TestLinks(t *testing.T) {
	t.Parallel()
	links := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, name := range markdown(t) {
		page := readPage(t, name)
		text := comment.ReplaceAllString(codeSpan.ReplaceAllString(withoutFences(page), ""), "")
		for _, m := range links.FindAllStringSubmatch(text, -1) {
			to, err := url.Parse(m[1])
			switch {
			case err != nil:
				t.Errorf("%s: link %s: %v", name, m[1], err)
			case to.Scheme != "":
			default:
				at := name
				if to.Path != "" {
					at = path.Join(path.Dir(name), to.Path)
				}
				if _, err := os.Stat(filepath.Join(root, at)); err != nil {
					t.Errorf("%s: link %s leads to no file", name, m[1])
				} else if to.Fragment != "" && path.Ext(at) == ".md" && !anchors(readPage(t, at))[to.Fragment] {
					t.Errorf("%s: link %s leads to no heading of %s", name, m[1], at)
				}
			}
		}
	}
}

func withoutFences(page string) string {
	var out strings.Builder
	fence := false
	for line := range strings.Lines(page) {
		mark := strings.HasPrefix(strings.TrimSpace(line), "```")
		if !fence && !mark {
			out.WriteString(line)
		}
		fence = fence != mark
	}
	return out.String()
}

// replacements are words that a reader has to translate, with the plain ones. The glossary and
// CONTRIBUTING.md have the rules behind them.
var replacements = []struct{ old, plain string }{
	{`anew`, "again"},
	{`at the moment`, "now"},
	{`beside`, "next to, or in addition to"},
	{`by and by`, "gradually"},
	{`by (it|them)sel(f|ves)`, "automatically, or alone"},
	{`(bring|brings|come|comes|go|goes) round`, "avoid, or say what happens"},
	{`first key`, "primary key"},
	{`for ever`, "without an end"},
	{`for want of`, "without"},
	{`goes on`, "continues"},
	{`hasty`, "non-blocking"},
	{`henceforth`, "from now on"},
	{`in the clear`, "in plaintext"},
	{`in the clothes of`, "say what looks like what"},
	{`in the midst`, "during"},
	{`known hole`, "known limitation"},
	{`let finish`, "finishes"},
	{`mend(ed|s)?`, "fix, repair, resolve"},
	{`mint(ed|s|ing)?`, "generate"},
	{`no such thing`, "say what is missing or not possible"},
	{`outstay(s|ed)?`, "exceed"},
	{`past (the|a) prox(y|ies)`, "to etcd directly, not through the proxy"},
	{`rescue`, "recovery"},
	{`reseal(s|ed|ing)?`, "re-encrypt"},
	{`seal(s|ed|ing)?`, "encrypt"},
	{`sees? to it`, "make sure"},
	{`somebody`, "someone, or name the actor: a client, an operator"},
	{`stand(s)? (in|on|there|as it|behind)`, "is in, is on"},
	{`stays? behind`, "is not forwarded"},
	{`stranger`, "unauthorized client"},
	{`switch(es|ed)? off`, "turn off"},
	{`tells? of`, "reports"},
	{`under way`, "current, running"},
	{`unseal(s|ed|ing)?`, "decrypt"},
	{`what (paid|did not pay)`, "these changes helped, or did not"},
	{`who(so)?ever`, "anyone who, or name the actor"},
	{`(lies|lie) (in|on|there)`, "is in, is on"},
}

// withOldWords are pages that may keep them.
var withOldWords []string

// TestLanguage requires plain words, outside of code.
func TestLanguage(t *testing.T) {
	t.Parallel()
	for _, name := range markdown(t) {
		if slices.Contains(withOldWords, name) {
			continue
		}
		text := prose(readPage(t, name))
		for _, r := range replacements {
			for _, at := range regexp.MustCompile(`(?i)\b`+r.old+`\b`).FindAllStringIndex(text, -1) {
				t.Errorf("%s:%d: %q: write plainly: %s", name, 1+strings.Count(text[:at[0]], "\n"), text[at[0]:at[1]], r.plain)
			}
		}
	}
}

// TestColumns requires that prose wraps at 100 columns. Tables and code may be wider. Generated
// pages wrap in their source.
func TestColumns(t *testing.T) {
	t.Parallel()
	for _, name := range markdown(t) {
		page := readPage(t, name)
		if strings.HasPrefix(page, "<!-- Generated") || slices.Contains(withOldWords, name) {
			continue
		}
		text := strings.Split(prose(page), "\n")
		for n, line := range strings.Split(page, "\n") {
			words := strings.Fields(strings.TrimLeft(text[n], " -*>0123456789."))
			if utf8.RuneCountInString(line) > 100 && len(words) > 1 && !strings.HasPrefix(strings.TrimSpace(line), "|") {
				t.Errorf("%s:%d has %d columns: wrap it at 100", name, n+1, utf8.RuneCountInString(line))
			}
		}
	}
}

// TestOpening requires that each page of the guides begins with a paragraph that says whom it is
// for.
func TestOpening(t *testing.T) {
	t.Parallel()
	for _, name := range markdown(t) {
		if !strings.HasPrefix(name, "docs/guides/") && !strings.HasPrefix(name, "docs/deploy/") {
			continue
		}
		_, rest, _ := strings.Cut(readPage(t, name), "\n\n")
		opening, _, _ := strings.Cut(rest, "\n\n")
		if !regexp.MustCompile(`\bFor\s`).MatchString(opening) {
			t.Errorf("%s: the first paragraph does not say whom the page is for: %s", name, opening)
		}
	}
}

func TestProse(t *testing.T) {
	got := prose("# A `b` c\n\n[d](e.md) f\n```\ng\n```\n<!-- h\ni --> j\n    k\n- l `m\n  n` o\n")
	want := "# A     c\n\n[d        f\n   \n \n   \n      \n      j\n     \n- l   \n     o\n"
	if got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestAnchors(t *testing.T) {
	got := anchors("# A `b`: c, d-e\n## x\n```\n# no\n```\n## x\n### [y](z.md)_w\n")
	for _, want := range []string{"a-b-c-d-e", "x", "x-1", "y_w"} {
		if !got[want] {
			t.Errorf("%q is not in %v", want, got)
		}
	}
	if len(got) != 4 {
		t.Errorf("%v", got)
	}
}

package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestErrorTexts requires that the error texts in the tables of the guides and the reference are
// those of the program: each part of a text between names, numbers and "…" must be in a string
// literal of its source.
func TestErrorTexts(t *testing.T) {
	t.Parallel()
	source := literals(t)
	checked := 0
	for _, name := range markdown(t) {
		if !strings.HasPrefix(name, "docs/guides/") && !strings.HasPrefix(name, "docs/deploy/") && !strings.HasPrefix(name, "docs/reference/") {
			continue
		}
		for _, cell := range messages(readPage(t, name)) {
			for _, span := range regexp.MustCompile("`[^`]+`").FindAllString(cell, -1) {
				text := strings.Trim(span, "`")
				if slices.ContainsFunc(foreign, func(f string) bool { return strings.Contains(text, f) }) {
					continue
				}
				checked++
				for _, part := range variable.Split(text, -1) {
					if part = strings.Trim(part, " :;,.()'"); !inSource(source, part) {
						t.Errorf("%s: %q: no text of the program has %q", name, text, part)
					}
				}
			}
		}
	}
	if checked < 100 {
		t.Errorf("only %d texts were found", checked)
	}
}

// foreign are parts of texts of other programs and libraries, and of one that is made of single
// words.
var foreign = []string{
	"address already in use", "bad certificate", "cannot assign requested address", "certificate has expired", "certificate required",
	"authentication handshake failed", "connection refused", "didn't provide a certificate", "error reading server preface", "no space left on device", "no such file",
	"permission denied", "database space exceeded", "docker", "PROXY_1_ADDRESS", "no access key ID", "systemd-analyze", "Failed to set up credentials", "signed by unknown authority", "cannot be pulled",
}

// variable is what stands for something else in a text of a page, or joins two texts.
var variable = regexp.MustCompile(`\bthe KMS (gave|may have given) it\b|\b(is|are) missing\b|\((Status|Decrypt)\b[^)]*\)|--[\w-]+ \S+|…|, and | within |\[-\]|"[^"]*"|[():]|\w+://|\b\d[\w.:/-]*|\b(N|HOST|PID|FILE|aescbc|caFile|Disabled|AssumeRole\w*)\b`)

// messages returns the cells of tables under the headings "message", "text", "reason", "end of the
// reason", "output" and "finding".
func messages(page string) (cells []string) {
	column := -1
	for line := range strings.Lines(page) {
		row := strings.TrimSpace(line)
		if !strings.HasPrefix(row, "|") {
			column = -1
			continue
		}
		fields := strings.Split(strings.Trim(row, "|"), "|")
		if column >= 0 && column < len(fields) {
			cells = append(cells, fields[column])
			continue
		}
		column = slices.IndexFunc(fields, func(f string) bool {
			return slices.Contains([]string{"message", "text", "reason", "end of the reason", "output", "finding"}, strings.TrimSpace(f))
		})
	}
	return cells
}

// inSource tells whether a text is made of at most two runs of words that literals have. A run has
// three words or more, unless the text is shorter.
func inSource(source, text string) bool {
	words := strings.Fields(text)
	if len(words) <= 3 {
		return strings.Contains(source, text)
	}
	for runs := 0; len(words) > 0; runs++ {
		n := len(words)
		for n > 0 && !strings.Contains(source, strings.Join(words[:n], " ")) {
			n--
		}
		if n < 3 || runs == 2 {
			return false
		}
		words = words[n:]
	}
	return true
}

// TestProgramTexts requires plain words in what the program prints, logs and names in JSON reports.
func TestProgramTexts(t *testing.T) {
	t.Parallel()
	texts := literals(t)
	for _, r := range append(slices.Clone(replacements), []struct{ old, plain string }{
		{`standing`, "state"}, {`unopened`, "not decrypted"}, {`looked ?at`, "checked"}, {`unproven`, "unconfirmed"},
		{`[a-z]+\(s\)`, "use printable.Count"},
		{`1 [a-z]+s (is|are|was|were|left)`, "use printable.Count"},
	}...) {
		for _, text := range regexp.MustCompile(`(?i)[^\x00]*\b`+r.old+`(\W[^\x00]*|\x00)`).FindAllString(texts, -1) {
			t.Errorf("%q: write plainly: %s", strings.Trim(text, "\x00"), r.plain)
		}
	}
}

// notProduct are folders of tests and of doubles for tests.
var notProduct = []string{"test", "findings", "internal/testing", "internal/clitest", "proxy/internal/proxytest", "kmsclient/kmstest"}

// literals returns the string literals of the product's source. Verbs of fmt separate texts.
func literals(t *testing.T) string {
	t.Helper()
	var out strings.Builder
	verbs := regexp.MustCompile(`%[-+# 0]*\d*(\.\d+)?[a-zA-Z]`)
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		below, _ := filepath.Rel(root, path)
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (slices.Contains(notProduct, below) || path != root && strings.HasPrefix(entry.Name(), ".")):
			return filepath.SkipDir
		case filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			e, ok := n.(ast.Expr)
			if !ok {
				return true
			}
			text, constant := literal(e)
			if constant {
				out.WriteString(verbs.ReplaceAllString(text, "\x00") + "\x00")
			}
			return !constant
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// literal returns the value of a string literal, or of literals that are joined by +.
func literal(e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, e.Kind == token.STRING && err == nil
	case *ast.BinaryExpr:
		x, okX := literal(e.X)
		y, okY := literal(e.Y)
		return x + y, okX && okY && e.Op == token.ADD
	}
	return "", false
}

// TestMetrics requires that the metrics that pages name are in the metrics reference.
func TestMetrics(t *testing.T) {
	t.Parallel()
	reference := readPage(t, "docs/reference/metrics.md")
	metric := regexp.MustCompile(`\betcd_kms_proxy_[a-z_]+[a-z]\b`)
	for _, name := range markdown(t) {
		page := readPage(t, name)
		if name == "docs/guides/monitor.md" { // its table has the names without their prefix
			_, table, _ := strings.Cut(page, "| metric (`etcd_kms_proxy_…`) |")
			table, _, _ = strings.Cut(table, "\n\n")
			page += regexp.MustCompile("(?m)^\\| `").ReplaceAllString(table, "| `etcd_kms_proxy_")
		}
		for _, m := range metric.FindAllString(page, -1) {
			if !strings.Contains(reference, m) {
				t.Errorf("%s: docs/reference/metrics.md has no metric %s", name, m)
			}
		}
	}
}

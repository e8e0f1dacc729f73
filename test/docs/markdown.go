package docs

import (
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// root is the folder of the repository.
const root = "../.."

// markdown returns the Markdown files of the repository, by their path below root.
func markdown(t *testing.T) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && path != root && (strings.HasPrefix(entry.Name(), ".") && entry.Name() != ".github" || entry.Name() == "testdata" || entry.Name() == "node_modules"):
			return filepath.SkipDir
		case filepath.Ext(path) == ".md":
			below, err := filepath.Rel(root, path)
			paths = append(paths, filepath.ToSlash(below))
			return err
		}
		return nil
	})
	if err != nil || len(paths) < 20 {
		t.Fatalf("%d Markdown files: %v", len(paths), err)
	}
	return paths
}

var (
	codeSpan = regexp.MustCompile("(?s)``.+?``|`[^`]+`")
	comment  = regexp.MustCompile(`(?s)<!--.*?-->`)
	target   = regexp.MustCompile(`\]\([^)]*\)`)
)

// prose returns a page's text with blanks in place of code, comments and the targets of links.
// Lines and columns stay as they are.
func prose(page string) string {
	var out strings.Builder
	fence := false
	for line := range strings.Lines(page) {
		mark := strings.HasPrefix(strings.TrimSpace(line), "```")
		if fence || mark || indented(line) {
			line = blank(line)
		}
		fence = fence != mark
		out.WriteString(line)
	}
	text := out.String()
	for _, remove := range []*regexp.Regexp{comment, codeSpan, target} {
		text = remove.ReplaceAllStringFunc(text, blank)
	}
	return text
}

// indented tells whether a line is code by its indentation. Items of lists in this project are
// indented by two or three columns, and their text is never code.
func indented(line string) bool {
	return strings.HasPrefix(line, "    ") && !listed.MatchString(line)
}

var listed = regexp.MustCompile(`^ {4,}([-*]|\d+\.) `)

// blank replaces everything but line ends by blanks.
func blank(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' {
			return r
		}
		return ' '
	}, s)
}

// anchors returns the anchors that GitHub gives the headings of a page.
func anchors(page string) map[string]bool {
	found := make(map[string]bool)
	fence := false
	for line := range strings.Lines(page) {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			fence = !fence
		}
		heading := strings.TrimLeft(line, "#")
		if fence || len(heading) == len(line) || !strings.HasPrefix(heading, " ") {
			continue
		}
		heading = target.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
		anchor := strings.ReplaceAll(notInAnchor.ReplaceAllString(heading, ""), " ", "-")
		for n := 1; found[anchor]; n++ {
			anchor = strings.TrimRight(anchor, "-0123456789") + "-" + string(rune('0'+n))
		}
		found[anchor] = true
	}
	return found
}

var notInAnchor = regexp.MustCompile(`[^\p{L}\p{N}_\- ]`)

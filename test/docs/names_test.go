package docs

import (
	"go/ast"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestFilesInComments requires that the Go files that comments of the product name are in the
// folder of the comment.
func TestFilesInComments(t *testing.T) {
	t.Parallel()
	name := regexp.MustCompile(`(?m)(^|[\s(])([a-z][a-z0-9_]*\.go)\b`)
	checked := 0
	inSource(t, func(path string, set *token.FileSet, file *ast.File) {
		for _, group := range file.Comments {
			for _, m := range name.FindAllStringSubmatch(group.Text(), -1) {
				checked++
				if _, err := os.Stat(filepath.Join(root, filepath.Dir(path), m[2])); err != nil {
					t.Errorf("%s:%d: there is no %s", path, set.Position(group.Pos()).Line, m[2])
				}
			}
		}
	})
	if checked < 10 {
		t.Errorf("only %d names were found", checked)
	}
}

// TestNamesInPages requires that the paths, tests and make targets that pages name exist.
func TestNamesInPages(t *testing.T) {
	t.Parallel()
	var (
		span   = regexp.MustCompile("`([^`\n]+)`")
		folder = regexp.MustCompile(`^(\.ci|cmd|config|crypto|deploy|docs|findings|internal|kmsclient|lifecycle|proxy|test)/[\w./-]+$`)
		test   = regexp.MustCompile(`^(Test|Fuzz)[A-Z]\w+$`)
		target = regexp.MustCompile(`^make ([a-z][a-z0-9-]*)`)
	)
	tests, targets := testNames(t), makeTargets(t)
	checked := 0
	for _, page := range markdown(t) {
		for _, m := range span.FindAllStringSubmatch(readPage(t, page), -1) {
			name := m[1]
			var ok bool
			switch to := target.FindStringSubmatch(name); {
			case strings.Contains(name, "NAME"):
				continue
			case to != nil:
				ok = targets[to[1]]
			case test.MatchString(name):
				ok = tests[name]
			case folder.MatchString(name):
				_, err := os.Stat(filepath.Join(root, name))
				ok = err == nil
			default:
				continue
			}
			if checked++; !ok {
				t.Errorf("%s: there is no %s", page, name)
			}
		}
	}
	if checked < 200 {
		t.Errorf("only %d names were found", checked)
	}
}

// testNames returns the names of the tests and fuzz targets of all modules.
func testNames(t *testing.T) map[string]bool {
	t.Helper()
	names := make(map[string]bool)
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() && path != root && strings.HasPrefix(entry.Name(), ".") {
			if err == nil {
				err = filepath.SkipDir
			}
			return err
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		data, err := os.ReadFile(path)
		for _, m := range declared.FindAllSubmatch(data, -1) {
			names[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// makeTargets returns the targets of the makefile.
func makeTargets(t *testing.T) map[string]bool {
	t.Helper()
	targets := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`).FindAllStringSubmatch(readPage(t, "Makefile"), -1) {
		targets[m[1]] = true
	}
	return targets
}

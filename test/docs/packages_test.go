package docs

import (
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPackages checks that the table in docs/design/architecture.md names every package of the
// product, and no other.
func TestPackages(t *testing.T) {
	t.Parallel()
	_, table, ok := strings.Cut(readPage(t, "docs/design/architecture.md"), "\n| package | does |\n")
	if !ok {
		t.Fatal("there is no table of packages")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	listed := make(map[string]bool)
	for row := range strings.Lines(table) {
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(strings.Split(row, "|")[1], -1) {
			listed[name[1]] = true
		}
	}
	for _, top := range []string{"cmd", "config", "crypto", "internal", "kmsclient", "lifecycle", "proxy"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.IsDir() {
				return err
			}
			files, err := filepath.Glob(filepath.Join(path, "*.go"))
			if err != nil {
				return err
			}
			product := false
			for _, file := range files {
				product = product || !strings.HasSuffix(file, "_test.go")
			}
			name, err := filepath.Rel(root, path)
			if name = filepath.ToSlash(name); product && !listed[name] {
				t.Errorf("the table does not name %s", name)
			}
			delete(listed, name)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	delete(listed, "test")
	for name := range listed {
		t.Errorf("the table names %s, which is no package", name)
	}
}

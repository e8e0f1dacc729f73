package docs

import (
	"go/ast"
	"go/token"
	"path/filepath"
	"testing"
)

// TestMeasures requires packages and types of a size that a reader can take in.
func TestMeasures(t *testing.T) {
	t.Parallel()
	const maxLines, maxMethods = 3000, 25
	lines, methods := make(map[string]int), make(map[string]int)
	inSource(t, func(path string, set *token.FileSet, file *ast.File) {
		lines[filepath.Dir(path)] += set.File(file.Pos()).LineCount()
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Recv == nil {
				continue
			}
			of := f.Recv.List[0].Type
			if p, ok := of.(*ast.StarExpr); ok {
				of = p.X
			}
			switch generic := of.(type) {
			case *ast.IndexExpr:
				of = generic.X
			case *ast.IndexListExpr:
				of = generic.X
			}
			methods[filepath.Dir(path)+"."+of.(*ast.Ident).Name]++
		}
	})
	for name, n := range lines {
		if n > maxLines {
			t.Errorf("package %s has %d lines: at most %d", name, n, maxLines)
		}
	}
	for name, n := range methods {
		if n > maxMethods {
			t.Errorf("type %s has %d methods: at most %d", name, n, maxMethods)
		}
	}
	if len(lines) < 30 || len(methods) < 100 {
		t.Errorf("only %d packages and %d types were found", len(lines), len(methods))
	}
}

package problem

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// TestOf: joined problems come out one by one, and keep their causes.
func TestOf(t *testing.T) {
	err := errors.Join(Problem{Path: "id", Text: "is missing", Hint: "add it"}, fs.ErrPermission, List{{Text: "a"}, {Path: "b.c", Text: "d"}})
	if len(Of(nil)) != 0 || In("x", "", nil) != nil {
		t.Error("nil has problems")
	}
	got := In("kms[0]", "see the docs", err)
	want := List{
		{Path: "kms[0].id", Text: "is missing", Hint: "add it"}, {Path: "kms[0]", Text: "permission denied", Hint: "see the docs"},
		{Path: "kms[0]", Text: "a", Hint: "see the docs"}, {Path: "kms[0].b.c", Text: "d", Hint: "see the docs"},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Problem{}, "Err")); diff != "" {
		t.Error(diff)
	}
	if !errors.Is(Of(err)[1], fs.ErrPermission) || !errors.Is(WithHint(fs.ErrExist, "move it"), fs.ErrExist) {
		t.Error("the cause is lost")
	}
	p := New("wait", "read %s: %w", "x", fs.ErrExist)
	if p.Error() != "read x: file already exists (wait)" || !errors.Is(p, fs.ErrExist) {
		t.Errorf("%v", p)
	}
	if got, want := (Problem{Path: "a", Line: 7, Text: "b", Hint: "c"}).Error(), "line 7: a: b (c)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

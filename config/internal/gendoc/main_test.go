package main

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestManualIsCurrent fails when a comment, tag or type changed and docs/reference/configuration.md
// did not.
func TestManualIsCurrent(t *testing.T) {
	want, err := render([]string{"../../types.go", "../../types_kms.go"}, "../../testdata/example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../../docs/reference/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("docs/reference/configuration.md is not what the types say; run make docs (-want +got):\n%s", diff)
	}
}

package config

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAudit(t *testing.T) {
	path := write(t, minimal+"audit: {path: audit.jsonl}\n")
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	want := &Audit{Path: filepath.Join(filepath.Dir(path), "audit.jsonl"), MaxSizeMiB: 100, MaxFiles: 10}
	if diff := cmp.Diff(want, got.Audit); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	for block, want := range map[string]string{
		"{required: true}":              "audit.path: is required",
		"{path: no/such/a.jsonl}":       "audit.path: its folder cannot be used",
		"{path: config.yaml/a}":         "audit.path: ",
		"{path: .}":                     "is no regular file",
		"{path: a, maxSizeMiB: 0}":      "audit.maxSizeMiB: 0 is not between 1 and",
		"{path: a, maxFiles: 1}":        "audit.maxFiles: 1 is not between 2 and",
		"{path: a, keyFile: none}":      "audit.keyFile: ",
		"{path: a, max: 1}":             "audit.max: unknown field",
		"{path: a, required: \"true\"}": "audit.required: ",
	} {
		_, err := Load(write(t, minimal+"audit: "+block+"\n"))
		if ps, ok := errors.AsType[Problems](err); !ok || len(ps) != 1 || ps[0].Line != 7 || !strings.Contains(ps[0].String(), want) {
			t.Errorf("%s: %v, want %q", block, err, want)
		}
	}
}

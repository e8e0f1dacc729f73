package alibaba

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// TestCAFile: calls are verified by the CAs that the file has, and by the last good ones while it
// cannot be used.
func TestCAFile(t *testing.T) {
	d, other := kmsdouble.New(t, kmsdouble.Config{}), kmsdouble.New(t, kmsdouble.Config{})
	file := filepath.Join(t.TempDir(), "ca.crt")
	put := func(data []byte) {
		t.Helper()
		if err := os.WriteFile(file+".new", data, 0o600); err != nil {
			t.Fatal(err)
		}
		before := time.Now().Add(-time.Second) // it is complete for a while
		if err := os.Chtimes(file+".new", before, before); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) []byte {
		t.Helper()
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	good, foreign := read(d.CAFile()), read(other.CAFile())
	put(good)
	b := newBackend(t, d, func(c *Config) { c.CAFile = file })
	step := func(what string, works, usable bool) {
		t.Helper()
		if _, err := b.GenerateDataKey(t.Context(), ""); (err == nil) != works {
			t.Errorf("%s: call: %v", what, err)
		}
		if err := b.CheckFiles(); (err == nil) != usable {
			t.Errorf("%s: files: %v", what, err)
		}
	}
	step("at the start", true, true)
	put(foreign)
	step("another CA", false, true)
	put(slices.Concat(good, foreign))
	step("both", true, true)
	put(slices.Concat(good, foreign[:len(foreign)/2]))
	step("half written", true, false)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	step("missing", true, false)
	put(good)
	step("good again", true, true)
}

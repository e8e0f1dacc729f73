package kubeadm

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestDiff(t *testing.T) {
	for _, c := range []struct{ name, old, text, want string }{
		{"one line", "a\nb\nc\nd\ne\nf\ng\nh\n", "a\nb\nc\nd\nX\nf\ng\nh\n", "@@ -2,7 +2,7 @@\n b\n c\n d\n-e\n+X\n f\n g\n h\n"},
		{"added", "a\nb\n", "a\nX\nb\n", "@@ -1,2 +1,3 @@\n a\n+X\n b\n"},
		{"removed", "a\nX\nb\n", "a\nb\n", "@@ -1,3 +1,2 @@\n a\n-X\n b\n"},
		{"no newline", "a", "a\n", "@@ -1,1 +1,1 @@\n-a\n\\ No newline at end of file\n+a\n"},
		{"two hunks", "1\n2\n3\n4\n5\n6\n7\n8\n9\n", "X\n2\n3\n4\n5\n6\n7\n8\nY\n", "@@ -1,4 +1,4 @@\n-1\n+X\n 2\n 3\n 4\n@@ -6,4 +6,4 @@\n 6\n 7\n 8\n-9\n+Y\n"},
	} {
		change := Change{"/f", []byte(c.old), []byte(c.text)}
		if got, want := change.Diff(), "--- /f\n+++ /f\n"+c.want; got != want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, want)
		}
	}
	made, gone, same := Change{"/f", nil, []byte("a\n")}, Change{"/f", []byte("a\n"), nil}, Change{"/f", []byte("a"), []byte("a")}
	if got := made.Diff(); got != "--- /dev/null\n+++ /f\n@@ -0,0 +1,1 @@\n+a\n" {
		t.Errorf("a new file:\n%s", got)
	}
	if got := gone.Diff(); got != "--- /f\n+++ /dev/null\n@@ -1,1 +0,0 @@\n-a\n" {
		t.Errorf("a removed file:\n%s", got)
	}
	if got := same.Diff(); got != "" {
		t.Errorf("no change:\n%s", got)
	}
}

// TestPatch has patch(1) apply random diffs.
func TestPatch(t *testing.T) {
	if _, err := exec.LookPath("patch"); err != nil {
		t.Skip("patch is not installed")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	r := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		var a, b strings.Builder
		for range 1 + r.IntN(40) {
			line := string(rune('a'+r.IntN(4))) + "\n"
			switch r.IntN(6) {
			case 0:
				a.WriteString(line)
			case 1:
				b.WriteString(line)
			default:
				a.WriteString(line)
				b.WriteString(line)
			}
		}
		c := Change{path, []byte(a.String()), []byte(b.String())}
		if c.Empty() || a.Len() == 0 || b.Len() == 0 {
			continue
		}
		if err := os.WriteFile(path, c.Old, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("patch", "-s", "-p0", path)
		cmd.Stdin = strings.NewReader(c.Diff())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("patch: %v, %s\n%s", err, out, c.Diff())
		}
		if got, _ := os.ReadFile(path); string(got) != b.String() {
			t.Fatalf("patched to %q, want %q:\n%s", got, b.String(), c.Diff())
		}
	}
}

// TestPut checks modes, and that no temporary file is left.
func TestPut(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f.yaml")
	for _, c := range []struct {
		text []byte
		mode os.FileMode
	}{{[]byte("a"), 0o600}, {[]byte("b"), 0o640}, {nil, 0}, {nil, 0}, {[]byte("c"), 0o600}} {
		if c.mode == 0o640 {
			if err := os.Chmod(path, 0o640); err != nil {
				t.Fatal(err)
			}
		}
		if err := writeFile(path, c.text); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if (err == nil) != (c.text != nil) || err == nil && info.Mode() != c.mode {
			t.Errorf("after %q: %v, %v", c.text, info, err)
		}
		if others, _ := filepath.Glob(dir + "/.*"); len(others) > 0 {
			t.Errorf("files are left: %q", others)
		}
	}
}

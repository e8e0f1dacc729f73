package kubeadm

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Change creates, replaces or removes one file.
type Change struct {
	Path string
	Old  []byte // nil if the file did not exist
	New  []byte // nil to remove the file
}

// change returns the change that writes text to the file at path, or removes it if text is nil.
func change(path string, text []byte) (Change, error) {
	old, err := os.ReadFile(path) //nolint:gosec // one of the files in Paths
	if errors.Is(err, fs.ErrNotExist) {
		old, err = nil, nil
	}
	return Change{path, old, text}, err
}

// Empty reports whether the file already has its new content.
func (c *Change) Empty() bool { return (c.Old == nil) == (c.New == nil) && bytes.Equal(c.Old, c.New) }

func (c *Change) write() error   { return writeFile(c.Path, c.New) }
func (c *Change) restore() error { return writeFile(c.Path, c.Old) }

// writeFile writes text to the file at path, atomically, or removes it if text is nil. A new file
// has mode
// 0600. The name of the temporary file begins with a dot, because kubelet ignores such files in its
// folder of manifests.
func writeFile(path string, text []byte) error {
	dir := filepath.Dir(path)
	if text == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncFolder(dir)
	}
	mode := fs.FileMode(0o600)
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) //nolint:errcheck // the file is gone after the rename, and any other error is returned
	_, err = f.Write(text)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncFolder(dir)
}

func syncFolder(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // see change
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// contextLines is how many unchanged lines [Change.Diff] prints around a change.
const contextLines = 3

// Diff returns the change as a unified diff, "" if it is empty.
func (c *Change) Diff() string {
	if c.Empty() {
		return ""
	}
	from, to := c.Path, c.Path
	if c.Old == nil {
		from = "/dev/null"
	}
	if c.New == nil {
		to = "/dev/null"
	}
	a, b := lines(c.Old), lines(c.New)
	edits := diff(a, b)
	var out strings.Builder
	fmt.Fprintf(&out, "--- %s\n+++ %s\n", from, to)
	for i := 0; i < len(edits); {
		if edits[i].op == ' ' {
			i++
			continue
		}
		start, end, quiet := max(0, i-contextLines), i, 0
		for ; end < len(edits) && quiet <= 2*contextLines; end++ {
			quiet++
			if edits[end].op != ' ' {
				quiet = 0
			}
		}
		end -= max(0, quiet-contextLines)
		hunk(&out, edits[start:end])
		i = end
	}
	return out.String()
}

// hunk prints one hunk of a unified diff.
func hunk(out *strings.Builder, edits []edit) {
	removed, added := 0, 0
	for _, e := range edits {
		if e.op != '+' {
			removed++
		}
		if e.op != '-' {
			added++
		}
	}
	position := func(at, count int) int {
		if count > 0 {
			at++ // lines count from 1; an empty range names the line before it
		}
		return at
	}
	fmt.Fprintf(out, "@@ -%d,%d +%d,%d @@\n", position(edits[0].a, removed), removed, position(edits[0].b, added), added)
	for _, e := range edits {
		text, ended := strings.CutSuffix(e.text, "\n")
		fmt.Fprintf(out, "%c%s\n", e.op, text)
		if !ended {
			out.WriteString("\\ No newline at end of file\n")
		}
	}
}

// edit is a line that is kept (' '), removed ('-') or added ('+'), before line a of the old file
// and line b of the new one, from 0.
type edit struct {
	op   byte
	text string
	a, b int
}

// lines splits text into lines, which keep their line ends.
func lines(text []byte) []string {
	all := strings.SplitAfter(string(text), "\n")
	if all[len(all)-1] == "" {
		all = all[:len(all)-1]
	}
	return all
}

// diff returns the edits that turn a into b, from their longest common subsequence. Time and memory
// grow with the product of the lengths between the common prefix and suffix, which is acceptable
// for manifests and configurations.
func diff(a, b []string) []edit {
	head := 0
	for head < len(a) && head < len(b) && a[head] == b[head] {
		head++
	}
	tail := 0
	for tail < len(a)-head && tail < len(b)-head && a[len(a)-1-tail] == b[len(b)-1-tail] {
		tail++
	}
	x, y := a[head:len(a)-tail], b[head:len(b)-tail]
	common := make([][]int, len(x)+1)
	for i := range common {
		common[i] = make([]int, len(y)+1)
	}
	for i := len(x) - 1; i >= 0; i-- {
		for j := len(y) - 1; j >= 0; j-- {
			if x[i] == y[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var edits []edit
	i, j := 0, 0
	add := func(op byte, text string) {
		edits = append(edits, edit{op, text, i, j})
		if op != '+' {
			i++
		}
		if op != '-' {
			j++
		}
	}
	for i < head {
		add(' ', a[i])
	}
	for i < len(a)-tail || j < len(b)-tail {
		p, q := i-head, j-head
		switch {
		case p < len(x) && q < len(y) && x[p] == y[q]:
			add(' ', x[p])
		case q == len(y) || p < len(x) && common[p+1][q] >= common[p][q+1]:
			add('-', x[p])
		default:
			add('+', y[q])
		}
	}
	for i < len(a) {
		add(' ', a[i])
	}
	return edits
}

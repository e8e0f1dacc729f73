package harness

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// Hierarchies returns the roots of all hierarchies of cgroup v1, or the root of cgroup v2.
func Hierarchies(tb testing.TB) []string {
	tb.Helper()
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	all, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil || len(all) == 0 {
		tb.Fatalf("there are no cgroups: %v", err)
	}
	for i := range all {
		all[i] = filepath.Dir(all[i])
	}
	return all
}

// NewCgroup creates a cgroup with the name, which begins with a slash, in all hierarchies. It
// removes the cgroup and those below it at the end of the test, by which time all processes in it
// must have ended.
func NewCgroup(tb testing.TB, name string) {
	tb.Helper()
	for _, root := range Hierarchies(tb) {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { removeCgroup(tb, dir) })
		// which a new cgroup of v1 does not inherit
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(root, file))
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, file), value, 0o600)
			}
			if err != nil {
				tb.Fatal(err)
			}
		}
	}
}

func removeCgroup(tb testing.TB, dir string) {
	var folders []string
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			folders = append(folders, path)
		}
		return nil
	})
	for _, folder := range slices.Backward(folders) {
		Eventually(tb, time.Minute, folder+" to be removed", func() error { return syscall.Rmdir(folder) })
	}
}

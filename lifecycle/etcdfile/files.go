package etcdfile

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Files lists the files below a directory, or the one file that path is. It follows symbolic links;
// one that leads nowhere or in a circle is an error. passed are what is neither a file nor a
// directory.
func Files(path string) (files, passed []string, err error) {
	w := walk{}
	err = w.visit(path, nil)
	return w.files, w.passed, err
}

type walk struct{ files, passed []string }

func (w *walk) visit(path string, above []os.FileInfo) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case info.Mode().IsRegular():
		w.files = append(w.files, path)
		return nil
	case !info.IsDir():
		w.passed = append(w.passed, path)
		return nil
	case slices.ContainsFunc(above, func(i os.FileInfo) bool { return os.SameFile(i, info) }):
		return fmt.Errorf("%s leads to a directory that it is in", path)
	}
	entries, err := os.ReadDir(path)
	for _, e := range entries {
		if err := w.visit(filepath.Join(path, e.Name()), append(above, info)); err != nil {
			return err
		}
	}
	return err
}

// MemberFiles is [Files] of a member's data directory, and of the directory of its write-ahead log
// if that is another one. One that lacks either is an error: it is not what it was taken for.
func MemberFiles(dataDir, walDir string) (files, passed []string, err error) {
	db := filepath.Join(dataDir, "member", "snap", "db")
	if info, err := os.Stat(db); err != nil {
		return nil, nil, fmt.Errorf("%s is no data directory of a member: %w", dataDir, err)
	} else if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is no data directory of a member: %s is no file", dataDir, db)
	}
	if files, passed, err = Files(dataDir); err != nil {
		return nil, nil, err
	}
	logs := filepath.Join(dataDir, "member", "wal")
	if walDir != "" {
		more, past, err := Files(walDir)
		if err != nil {
			return nil, nil, err
		}
		files, passed, logs = append(files, more...), append(passed, past...), walDir
	}
	isLog := func(f string) bool { return filepath.Dir(f) == filepath.Clean(logs) && strings.HasSuffix(f, ".wal") }
	if !slices.ContainsFunc(files, isLog) {
		return nil, nil, fmt.Errorf("%s holds no write-ahead log, NAME.wal", logs)
	}
	return files, passed, nil
}

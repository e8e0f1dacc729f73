package etcdfile

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Files lists the files in a directory and its subdirectories, or the one file at path. It follows
// symbolic links; a broken link or a cycle is an error. special are the entries that are neither
// files nor directories.
func Files(path string) (files, special []string, err error) {
	w := walk{}
	err = w.visit(path, nil)
	return w.files, w.special, err
}

type walk struct{ files, special []string }

func (w *walk) visit(path string, above []os.FileInfo) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case info.Mode().IsRegular():
		w.files = append(w.files, path)
		return nil
	case !info.IsDir():
		w.special = append(w.special, path)
		return nil
	case slices.ContainsFunc(above, func(i os.FileInfo) bool { return os.SameFile(i, info) }):
		return fmt.Errorf("%s is a symbolic link to a directory that contains it", path)
	}
	entries, err := os.ReadDir(path)
	for _, e := range entries {
		if err := w.visit(filepath.Join(path, e.Name()), append(above, info)); err != nil {
			return err
		}
	}
	return err
}

// MemberFiles is [Files] for a member's data directory, and for the directory of its write-ahead
// log if that is a different one. It returns an error if a directory holds no database or no log,
// and so is not that of a member.
func MemberFiles(dataDir, walDir string) (files, special []string, err error) {
	db := filepath.Join(dataDir, "member", "snap", "db")
	if info, err := os.Stat(db); err != nil {
		return nil, nil, fmt.Errorf("%s is not the data directory of a member: %w", dataDir, err)
	} else if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is not the data directory of a member: %s is not a regular file", dataDir, db)
	}
	if files, special, err = Files(dataDir); err != nil {
		return nil, nil, err
	}
	logs := filepath.Join(dataDir, "member", "wal")
	if walDir != "" {
		more, moreSpecial, err := Files(walDir)
		if err != nil {
			return nil, nil, err
		}
		files, special, logs = append(files, more...), append(special, moreSpecial...), walDir
	}
	isLog := func(f string) bool { return filepath.Dir(f) == filepath.Clean(logs) && strings.HasSuffix(f, ".wal") }
	if !slices.ContainsFunc(files, isLog) {
		return nil, nil, fmt.Errorf("%s holds no write-ahead log, NAME.wal", logs)
	}
	return files, special, nil
}

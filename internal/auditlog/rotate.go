package auditlog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/durable"
)

// rotate renames the file to its path with the number of its last record, and begins a new file. On
// an error the old file stays in use at its path. mu is held.
func (l *Log) rotate() error {
	if err := l.f.Sync(); err != nil {
		return err
	}
	name, err := freeName(fmt.Sprintf("%s.%012d", l.cfg.Path, l.seq))
	if err != nil {
		return err
	}
	if err := os.Rename(l.cfg.Path, name); err != nil {
		return err
	}
	f, info, err := create(l.cfg.Path)
	if errors.Is(err, fs.ErrExist) {
		return err // and the next record finds that another file has taken the place
	}
	if err != nil {
		return errors.Join(err, os.Rename(name, l.cfg.Path))
	}
	_ = l.f.Close() // it was synced
	l.f, l.info, l.size, l.whole, l.unterminated, l.first, l.afterFile = f, info, 0, 0, false, true, filepath.Base(name)
	if err := l.prune(); err != nil {
		l.log.Warn("old files of the audit log are not removed", "path", l.cfg.Path, "error", err)
	}
	return nil
}

// create makes a file that must not exist, and makes its name last.
func create(path string) (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|os.O_APPEND|noFollow, 0o600) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = lock(f)
	}
	if err == nil {
		err = durable.SyncFolder(filepath.Dir(path))
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	return f, info, nil
}

// freeName returns name, or name with a number appended: records of another chain may have the
// same numbers.
func freeName(name string) (string, error) {
	for i := range 1000 {
		try := name
		if i > 0 {
			try = fmt.Sprintf("%s-%03d", name, i)
		}
		if _, err := os.Lstat(try); errors.Is(err, fs.ErrNotExist) {
			return try, nil
		} else if err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("%s: too many files have this name", name)
}

// prune removes the oldest files beyond MaxFiles.
func (l *Log) prune() error {
	names, err := rotated(l.cfg.Path)
	if err != nil {
		return err
	}
	var problems []error
	for len(names)+1 > l.cfg.MaxFiles {
		problems = append(problems, os.Remove(names[0]))
		names = names[1:]
	}
	return errors.Join(problems...)
}

// rotated returns the older files of the log at path, oldest first: their names sort as their
// numbers do.
func rotated(path string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".")
		if ok && e.Type().IsRegular() && len(number) >= 12 && strings.Trim(number, "0123456789-") == "" {
			names = append(names, filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
	slices.Sort(names)
	return names, nil
}

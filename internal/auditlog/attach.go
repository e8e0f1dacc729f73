package auditlog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// ensureFile checks that f is still the file at the path. It may have been moved or removed, and
// records in it would be lost. mu is held.
func (l *Log) ensureFile() error {
	if l.f != nil {
		now, err := os.Lstat(l.cfg.Path)
		if err == nil && os.SameFile(now, l.info) || err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		l.log.Error("the file of the audit log was moved or removed: the log continues in a new file", "path", l.cfg.Path)
		_ = l.f.Close() // nothing more is written to it
		l.f, l.dirty, l.torn = nil, false, nil
	}
	return l.attach()
}

// attach opens the file at the path, and continues the chain at its end, at the end of the newest
// rotated file, or where l was before. mu is held, or l is not shared yet.
func (l *Log) attach() error {
	f, err := os.OpenFile(l.cfg.Path, os.O_RDWR|os.O_CREATE|os.O_APPEND|noFollow, 0o600)
	if isLink(err) {
		return errors.New("it is a symbolic link: name the file itself")
	}
	if err != nil {
		return err
	}
	if err := l.continueIn(f); err != nil {
		_ = f.Close() // nothing was written to it
		return err
	}
	return nil
}

// continueIn is the rest of attach.
func (l *Log) continueIn(f *os.File) error {
	info, err := f.Stat()
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return errors.New("it is not a regular file")
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("users other than its owner can write it (mode %04o): run chmod 600 on it", info.Mode().Perm())
	}
	if err := lock(f); err != nil {
		return err
	}
	end, err := readEnd(f)
	if err != nil {
		return err
	}
	after := ""
	if !end.found && l.seq == 0 {
		if end, after, err = l.predecessor(end); err != nil {
			return err
		}
	}
	switch {
	case end.found && end.chainKey != l.chain.id:
		return l.otherKey(end.chainKey)
	case end.found && l.seq > 0 && (end.seq != l.seq || end.hash != l.previous):
		return errors.New("another log has taken its place: move that away")
	}
	l.first = end.whole == 0
	if end.found {
		l.seq, l.previous = end.seq, end.hash
	}
	l.f, l.info, l.size, l.whole, l.torn, l.unterminated, l.afterFile = f, info, end.size, end.whole, end.torn, end.unterminated, after
	return nil
}

func (l *Log) otherKey(id string) error {
	return fmt.Errorf("its chain has %s, and the configuration %s: bring the key file back, or move the log and its older files away",
		keyName(id), keyName(l.chain.id))
}

func keyName(id string) string {
	if id == "" {
		return "no key"
	}
	return "the key " + id
}

// predecessor replaces the end of a file without a record by that of the newest rotated file, if
// there is one. Next to files of another chain, a new chain would not do: theirs have the higher
// numbers, so that its own would be the first to be removed.
func (l *Log) predecessor(end fileEnd) (fileEnd, string, error) {
	names, err := rotated(l.cfg.Path)
	if err != nil || len(names) == 0 {
		return end, "", err
	}
	name := names[len(names)-1]
	f, err := os.OpenFile(name, os.O_RDONLY|noFollow, 0) //nolint:gosec // next to the file that the operator names
	if err != nil {
		return end, "", fmt.Errorf("continue from %s: %w", name, err)
	}
	defer f.Close()
	before, err := readEnd(f)
	if err != nil {
		return end, "", fmt.Errorf("continue from %s: %w", name, err)
	}
	if before.found && before.chainKey != l.chain.id {
		return end, "", fmt.Errorf("continue from %s: %w", name, l.otherKey(before.chainKey))
	}
	if before.found {
		end.found, end.seq, end.hash, end.chainKey = true, before.seq, before.hash, before.chainKey
	}
	return end, filepath.Base(name), nil
}

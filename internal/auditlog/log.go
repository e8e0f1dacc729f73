package auditlog

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Config is where a log is and how large it gets. The zero value of a field but Path is its
// default.
type Config struct {
	Path string // its folder must exist
	// bytes of a file, beyond which the next record begins a new one; default 100 MiB
	MaxSize  int64
	MaxFiles int // with the one in use; the oldest is removed; default 10
	// of the chain, 32 to 4,096 bytes; nil is a chain without a key. It is not copied
	Key []byte
	// Required refuses actions that cannot be recorded; see [Log.Do].
	Required bool
	Logger   *slog.Logger // nil: nothing is logged
}

const (
	defaultMaxSize  = 100 << 20
	defaultMaxFiles = 10

	outageLogInterval = time.Minute      // between two outages that are logged
	rotateRetry       = 10 * time.Second // after a rotation that failed
)

// ErrInUse is in the error of [Open] when another process writes the log.
var ErrInUse = errors.New("another process writes it")

// Log is an audit log that is being written. Its methods are safe for concurrent use. A nil Log, of
// a configuration without an audit log, records nothing and refuses nothing. A record is in the
// kernel's page cache when Record returns, and survives the end of the process; it is on the disk
// only after a rotation or Close, or when the kernel has written it there.
type Log struct {
	cfg   Config
	chain chain
	log   *slog.Logger

	lostEver atomic.Uint64
	failing  atomic.Bool

	mu           sync.Mutex
	closed       bool
	f            *os.File    // nil after it was lost, until it can be opened again
	info         fs.FileInfo // identifies f
	size         int64       // of f, as far as it is known to be good
	whole        int64       // bytes of f up to the end of its last whole record
	dirty        bool        // f may be longer than size: a record was written in part
	torn         *tornLine   // what follows whole and cannot be removed
	unterminated bool        // f does not end with a line break

	seq       uint64
	previous  sum
	first     bool   // the next record is the first of its file
	afterFile string // the name that the file before got

	lost        uint64 // lost records that no record reports yet
	lostSince   time.Time
	logged      bool // the loss was logged
	loggedAt    time.Time
	rotateAfter time.Time // a rotation failed: none before this
}

// Open begins to write the log at cfg.Path, where it ended if it is there. The file is made with
// mode 0600. Open refuses a symbolic link, what is not a regular file, a file that others may write
// or that another process writes ([ErrInUse]), one that is not a log, and one whose chain has
// another key, or none while cfg has one. Close must follow.
func Open(cfg Config) (*Log, error) {
	if cfg.MaxSize < 0 || cfg.MaxFiles < 0 {
		return nil, errors.New("audit log: sizes must not be negative")
	}
	if cfg.MaxSize == 0 {
		cfg.MaxSize = defaultMaxSize
	}
	if cfg.MaxFiles == 0 {
		cfg.MaxFiles = defaultMaxFiles
	}
	c, err := newChain(cfg.Key)
	if err != nil {
		return nil, err
	}
	l := &Log{cfg: cfg, chain: c, log: cfg.Logger}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	if err := l.attach(); err != nil {
		return nil, fmt.Errorf("audit log %s: %w", cfg.Path, err)
	}
	return l, nil
}

// Record appends r. If that fails, the record is lost and counted, and the next one that can be
// written says so before itself.
func (l *Log) Record(r Record) {
	if l == nil {
		return
	}
	e := newEntry(r)
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.recover()
	if err == nil {
		err = l.append(e)
	}
	if err != nil {
		l.countLost(err)
	}
}

// Started records the start of a process of this version, with the digest of its configuration.
func (l *Log) Started(version string, config [32]byte) {
	l.Record(Record{Event: EventStart, Version: version, Config: hex.EncodeToString(config[:])})
}

// Stopped records the end of a process. err is the reason, nil after a signal.
func (l *Log) Stopped(err error) {
	l.Record(Record{Event: EventStop}.Ended(err))
}

// Check returns nil if the last record was written, or if the log can be written again: it tries.
// The error says why records are lost.
func (l *Log) Check() error {
	if l == nil || !l.failing.Load() {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.recover(); err != nil {
		return fmt.Errorf("the audit log cannot be written: %w", err)
	}
	return nil
}

// Lost is how many records were lost since Open.
func (l *Log) Lost() uint64 {
	if l == nil {
		return 0
	}
	return l.lostEver.Load()
}

// Close syncs and releases the file. Later records are lost.
// It may be called more than once.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	if l.f == nil {
		return nil
	}
	err := errors.Join(l.f.Sync(), l.f.Close())
	l.f = nil
	if err != nil {
		return fmt.Errorf("close audit log: %w", err)
	}
	return nil
}

// CloseLogged is Close for a long-running process, which logs the error.
func (l *Log) CloseLogged(log *slog.Logger) {
	if err := l.Close(); err != nil {
		log.Error("the end of the audit log may be missing from the disk", "error", err)
	}
}

// recover writes, after records were lost, how many. mu is held.
func (l *Log) recover() error {
	if l.lost == 0 {
		return nil
	}
	e := newEntry(Record{Event: eventLost})
	e.Lost, e.Since = l.lost, stamp(l.lostSince)
	if err := l.append(e); err != nil {
		return err
	}
	if l.logged {
		l.log.Warn("the audit log is written again", "lost", l.lost, "path", l.cfg.Path)
	}
	l.lost, l.logged = 0, false
	l.failing.Store(false)
	return nil
}

// countLost counts a record that could not be written. mu is held.
func (l *Log) countLost(err error) {
	l.lostEver.Add(1)
	if l.lost == 0 {
		l.lostSince = time.Now()
	}
	l.lost++
	l.failing.Store(true)
	// At most one message a minute, also if the disk alternates between full and not full.
	if now := time.Now(); !l.logged && now.Sub(l.loggedAt) >= outageLogInterval {
		l.logged, l.loggedAt = true, now
		l.log.Error("the audit log cannot be written: records are lost", "path", l.cfg.Path, "error", err)
	}
}

// append writes e, after what must be said first. mu is held.
func (l *Log) append(e entry) error {
	if l.closed {
		return errors.New("it is closed")
	}
	if err := l.ensureFile(); err != nil {
		return err
	}
	if err := l.repair(); err != nil {
		return err
	}
	text, s, err := l.encode(&e)
	if err != nil {
		return err
	}
	// A file is not left without its last line break, which the next record would have brought.
	if l.size > 0 && !l.unterminated && l.size+int64(len(text)) > l.cfg.MaxSize && !time.Now().Before(l.rotateAfter) {
		if err := l.rotate(); err != nil {
			// A file that is too large is better than a record that is lost.
			l.rotateAfter = time.Now().Add(rotateRetry)
			l.log.Error("the audit log cannot start a new file, and continues the old one", "path", l.cfg.Path, "error", err)
		} else if text, s, err = l.encode(&e); err != nil {
			return err
		}
	}
	return l.write(text, s)
}

// encode returns the line of e as the next record.
func (l *Log) encode(e *entry) ([]byte, sum, error) {
	e.Seq, e.ChainKey, e.PreviousHash, e.PreviousFile = l.seq+1, l.chain.id, "", ""
	if l.first && l.seq > 0 {
		e.PreviousHash, e.PreviousFile = l.previous.String(), l.afterFile
	}
	body, err := e.body()
	if err != nil {
		return nil, sum{}, err
	}
	s := l.chain.next(l.previous, body)
	return line(body, s), s, nil
}

// write puts the line of the next record, with hash s, at the end of the file.
func (l *Log) write(text []byte, s sum) error {
	if l.unterminated {
		text = append([]byte{'\n'}, text...)
	}
	n, err := l.f.Write(text)
	if err != nil {
		l.dirty = n > 0 && l.f.Truncate(l.size) != nil
		return err
	}
	l.size += int64(n)
	l.whole = l.size
	l.seq, l.previous, l.first, l.unterminated = l.seq+1, s, false, false
	return nil
}

// repair removes the remains of a failed write, or ends their line if that is not possible. It also
// ends a line that a crash has cut. mu is held.
func (l *Log) repair() error {
	if l.dirty {
		if err := l.f.Truncate(l.size); err != nil { // a file that may only grow
			end, endErr := readEnd(l.f)
			if endErr != nil {
				return errors.Join(err, endErr)
			}
			if end.whole > l.whole { // the record has all but its line break
				l.seq, l.previous, l.first = end.seq, end.hash, false
			}
			l.size, l.whole, l.torn, l.unterminated = end.size, end.whole, end.torn, end.unterminated
		}
		l.dirty = false
	}
	if l.torn == nil {
		return nil
	}
	e := newEntry(Record{Event: eventTorn})
	e.TornBytes, e.TornHash = l.torn.bytes, l.torn.hash
	text, s, err := l.encode(&e)
	if err != nil {
		return err
	}
	if err := l.write(text, s); err != nil {
		return err
	}
	l.torn = nil
	return nil
}

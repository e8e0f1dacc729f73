package auditlog

import (
	"encoding/hex"
	"errors"
	"log/slog"
)

// ErrUnwritable is returned for an action that was refused because it could not be recorded.
var ErrUnwritable = errors.New("the audit log cannot be written, and audit.required is set")

// Recorder records events in a log that may be required. A nil Recorder, of a configuration without
// an audit log, records nothing and refuses nothing. It is safe for concurrent use.
type Recorder struct {
	log      *Log
	required bool
}

// NewRecorder opens the log of cfg. With required, actions that cannot be recorded are refused.
// [Recorder.Close] must follow.
func NewRecorder(cfg Config, required bool) (*Recorder, error) {
	l, err := Open(cfg)
	if err != nil {
		return nil, err
	}
	return &Recorder{log: l, required: required}, nil
}

// Close closes the log. An error says that the last records may not be on the disk.
func (r *Recorder) Close() error {
	if r == nil {
		return nil
	}
	return r.log.Close()
}

// CloseLogged is Close for a long-running process, which logs the error.
func (r *Recorder) CloseLogged(log *slog.Logger) {
	if err := r.Close(); err != nil {
		log.Error("the end of the audit log may be missing from the disk", "error", err)
	}
}

// Record records one event.
func (r *Recorder) Record(event Record) {
	if r != nil {
		r.log.Record(event)
	}
}

// Started records the start of a process of this version, with the digest of its configuration.
func (r *Recorder) Started(version string, config [32]byte) {
	r.Record(Record{Event: EventStart, Version: version, Config: hex.EncodeToString(config[:])})
}

// Stopped records the end of a process. err is the reason, nil after a signal.
func (r *Recorder) Stopped(err error) {
	record := Record{Event: EventStop, Outcome: "ok"}
	if err != nil {
		record.Outcome, record.Reason = "failed", err.Error()
	}
	r.Record(record)
}

// Check returns why the log cannot be written, or nil.
func (r *Recorder) Check() error {
	if r == nil {
		return nil
	}
	return r.log.Check()
}

// Lost returns the number of records that could not be written.
func (r *Recorder) Lost() uint64 {
	if r == nil {
		return 0
	}
	return r.log.Lost()
}

// Required reports whether actions are refused while they cannot be recorded.
func (r *Recorder) Required() bool { return r != nil && r.required }

// Refusal returns [ErrUnwritable] while actions are refused, and nil otherwise.
func (r *Recorder) Refusal() error {
	if !r.Required() || r.log.Check() == nil {
		return nil
	}
	return ErrUnwritable
}

// Do calls f if what it does can be recorded. It returns [ErrUnwritable] if it cannot, or if a
// record was lost meanwhile: the caller must not use the result of f then. An error of f takes
// precedence.
func (r *Recorder) Do(f func() error) error {
	if !r.Required() {
		return f()
	}
	lost := r.log.Lost()
	if err := r.Refusal(); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if r.log.Lost() != lost {
		return ErrUnwritable
	}
	return nil
}

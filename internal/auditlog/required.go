package auditlog

import "errors"

// ErrUnwritable is returned for an action that was refused because it could not be recorded.
var ErrUnwritable = errors.New("the audit log cannot be written, and audit.required is set")

// Required reports whether actions are refused while they cannot be recorded.
func (l *Log) Required() bool { return l != nil && l.cfg.Required }

// Refusal returns [ErrUnwritable] while actions are refused, and nil otherwise.
func (l *Log) Refusal() error {
	if !l.Required() || l.Check() == nil {
		return nil
	}
	return ErrUnwritable
}

// Do calls f if what it does can be recorded. It returns [ErrUnwritable] if it cannot, or if a
// record was lost meanwhile: the caller must not use the result of f then. An error of f takes
// precedence.
func (l *Log) Do(f func() error) error {
	if !l.Required() {
		return f()
	}
	lost := l.Lost()
	if err := l.Refusal(); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if l.Lost() != lost {
		return ErrUnwritable
	}
	return nil
}

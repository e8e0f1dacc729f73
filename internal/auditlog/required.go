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

// Action is something that must be recorded if the log is required. The zero value is for a log
// that is not.
type Action struct {
	log  *Log
	lost uint64 // records at the beginning
}

// Begin begins an action that is recorded meanwhile. It returns [ErrUnwritable] if it cannot be.
func (l *Log) Begin() (Action, error) {
	if !l.Required() {
		return Action{}, nil
	}
	return Action{l, l.Lost()}, l.Refusal()
}

// End returns [ErrUnwritable] if a record was lost since [Log.Begin]: the caller must not use the
// result of the action then.
func (a Action) End() error {
	if a.log != nil && a.log.Lost() != a.lost {
		return ErrUnwritable
	}
	return nil
}

// Do calls f as an action. It returns [ErrUnwritable] if the action cannot be recorded or if a
// record was lost meanwhile. An error of f takes precedence.
func (l *Log) Do(f func() error) error {
	action, err := l.Begin()
	if err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	return action.End()
}

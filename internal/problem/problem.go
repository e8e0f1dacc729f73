// Package problem holds errors that say where a configuration is wrong and what to do about it.
//
// The package that finds a problem fills in the path, relative to the part of the configuration
// that it was given; its caller completes the path with [In]. So `config check`, the commands and
// the log report the same problem in the same words, and nobody parses an error text. The package
// imports the standard library only.
package problem

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Problem is one thing that is wrong, mostly with a configuration or a file that it names.
type Problem struct {
	Path string `json:"path"`           // the field, e.g. "rules[1].prefix"; "" if it is about the whole
	Line int    `json:"line,omitempty"` // of the configuration file, from 1; 0 if unknown
	Text string `json:"text"`           // what is wrong
	Hint string `json:"hint,omitempty"` // what to do, one imperative sentence; may be empty
	Err  error  `json:"-"`              // the cause, for [errors.Is]; may be nil
}

// New returns a problem that has no path.
func New(hint, format string, args ...any) Problem {
	err := fmt.Errorf(format, args...)
	return Problem{Text: err.Error(), Hint: hint, Err: errors.Unwrap(err)}
}

// WithHint returns err with advice, as an error without a path.
func WithHint(err error, hint string) Problem {
	return Problem{Text: err.Error(), Hint: hint, Err: err}
}

// String returns "line 7: rules[1].prefix: text".
func (p Problem) String() string {
	var b strings.Builder
	if p.Line > 0 {
		b.WriteString("line " + strconv.Itoa(p.Line) + ": ")
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Text)
	return b.String()
}

// Error returns String and the hint in parentheses, for logs.
func (p Problem) Error() string {
	if p.Hint == "" {
		return p.String()
	}
	return p.String() + " (" + p.Hint + ")"
}

// Unwrap returns Err.
func (p Problem) Unwrap() error { return p.Err }

// List is several problems. It has at least one element.
type List []Problem

// Error returns a line for each problem, with its hint.
func (l List) Error() string {
	lines := make([]string, len(l))
	for i, p := range l {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

// Of returns the problems that err is or joins. Any other error is a problem without a path and a
// hint; nil has no problems.
func Of(err error) List {
	switch e := err.(type) { //nolint:errorlint // a wrapper's text counts, and is in none of the wrapped problems
	case nil:
		return nil
	case Problem:
		return List{e}
	case List:
		return e
	case interface{ Unwrap() []error }:
		var all List
		for _, one := range e.Unwrap() {
			all = append(all, Of(one)...)
		}
		return all
	}
	return List{{Text: err.Error(), Err: err}}
}

// In returns the problems of err with path before their own paths, and hint for those without one.
// It returns nil for nil.
func In(path, hint string, err error) error {
	if err == nil {
		return nil
	}
	return Of(err).In(path, hint)
}

// In returns the list with path before the paths of its problems, and hint for those without one.
func (l List) In(path, hint string) List {
	all := make(List, len(l))
	for i, p := range l {
		switch {
		case p.Path == "":
			p.Path = path
		case path != "":
			p.Path = path + "." + p.Path
		}
		if p.Hint == "" {
			p.Hint = hint
		}
		all[i] = p
	}
	return all
}

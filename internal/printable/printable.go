// Package printable writes text that others have chosen, such as key IDs, etcd keys and the
// messages of a KMS, so that it is safe to read on a terminal and in a log: a newline in it would
// forge a line of a report, a tab a column, and an escape sequence would reach the terminal.
//
// All text output of the commands goes through [Fprintf], which makes each argument one line of
// printable characters. A test of the command line fails on any other way.
package printable

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Name returns a name as reports print it: unchanged, or as a quoted Go string if it is empty or
// contains a space, a quotation mark, a backslash or anything that is not printable.
func Name(name string) string {
	if name == "" || strings.ContainsAny(name, " \"\\") || Text(name) != name {
		return strconv.Quote(name)
	}
	return name
}

// NameOrNone returns [Name] of a name, or none for "". A name that is "none" is quoted.
func NameOrNone(name string) string {
	switch name {
	case "":
		return "none"
	case "none":
		return strconv.Quote(name)
	}
	return Name(name)
}

// UTF8 returns text that is valid UTF-8 unchanged, and escapes other bytes as a Go string does. It
// is for etcd keys in metrics, logs and audit records, where JSON would turn all invalid bytes into
// the same replacement character.
func UTF8(text string) string {
	if utf8.ValidString(text) {
		return text
	}
	return Text(text)
}

// Text returns text as one line, with a Go string's escapes for everything that is neither a
// printable character nor a space. Characters that are invisible or change the direction of writing
// are not printable.
func Text(text string) string {
	if !strings.ContainsFunc(text, unprintable) && utf8.ValidString(text) {
		return text
	}
	var b strings.Builder
	for len(text) > 0 {
		r, size := utf8.DecodeRuneInString(text)
		if unprintable(r) || r == utf8.RuneError && size == 1 {
			escaped := strconv.Quote(text[:size])
			b.WriteString(escaped[1 : len(escaped)-1])
		} else {
			b.WriteString(text[:size])
		}
		text = text[size:]
	}
	return b.String()
}

func unprintable(r rune) bool { return !strconv.IsPrint(r) }

// Count returns a number with the words for one or for several, as in "1 value" and "3 values".
func Count[N int | int64 | uint64](n N, one, several string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, several)
}

// Fprintf is [fmt.Fprintf] for text that people read: each argument is printed as [Text] has it,
// and only format ends lines. It returns no error: reports are written to a buffer first, and a
// closed standard error ends the command.
func Fprintf(w io.Writer, format string, args ...any) {
	_, _ = fmt.Fprintf(w, format, shown(args)...)
}

// Sprintf is [Fprintf] into a string.
func Sprintf(format string, args ...any) string { return fmt.Sprintf(format, shown(args)...) }

func shown(args []any) []any {
	wrapped := make([]any, len(args))
	for i, a := range args {
		wrapped[i] = a
		switch a.(type) {
		case nil:
		case error, fmt.Stringer:
			wrapped[i] = printedText{a}
		default:
			if k := reflect.TypeOf(a).Kind(); k != reflect.Bool && (k < reflect.Int || k > reflect.Complex128) {
				wrapped[i] = printedText{a}
			}
		}
	}
	return wrapped
}

// printedText prints its value as printable text.
type printedText struct{ value any }

// Format implements [fmt.Formatter].
func (p printedText) Format(f fmt.State, verb rune) {
	form := fmt.FormatString(f, verb)
	if verb != 's' && verb != 'v' { // %q and %x escape their argument
		_, _ = fmt.Fprintf(f, form, p.value)
		return
	}
	text := fmt.Sprintf("%"+string(verb), p.value)
	if _, ok := p.value.(error); ok {
		text = strings.ReplaceAll(text, "\n", "; ") // between the errors of a list
	}
	_, _ = fmt.Fprintf(f, strings.ReplaceAll(form, "v", "s"), Text(text))
}

// JSON returns a writer that adds JSON escapes for characters that are not printable, which leaves
// the values unchanged. encoding/json and slog escape control characters below U+0020 only. Each
// Write must hold whole characters, as theirs do.
func JSON(w io.Writer) io.Writer { return jsonText{w} }

type jsonText struct{ w io.Writer }

// Write implements [io.Writer].
func (j jsonText) Write(b []byte) (int, error) {
	special := func(r rune) bool { return r > '~' && unprintable(r) }
	if !bytes.ContainsFunc(b, special) {
		return j.w.Write(b)
	}
	escaped := make([]byte, 0, len(b)+16)
	for _, r := range string(b) {
		switch {
		case !special(r):
			escaped = utf8.AppendRune(escaped, r)
		case r > 0xFFFF:
			high, low := utf16.EncodeRune(r)
			escaped = fmt.Appendf(escaped, `\u%04x\u%04x`, high, low)
		default:
			escaped = fmt.Appendf(escaped, `\u%04x`, r)
		}
	}
	if _, err := j.w.Write(escaped); err != nil {
		return 0, err
	}
	return len(b), nil
}

// NewLogger returns a logger that writes one line for each record, as format, text or JSON.
func NewLogger(w io.Writer, format string, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(JSON(w), options))
}

package cli

import (
	"bytes"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Key IDs, etcd keys, the names in stored values and the texts of a KMS are written by others. A
// newline in one would forge a line of a report, a tab a column, and an escape sequence would reach
// the terminal. So all text output of the commands goes through [printf], which makes each argument
// one line of printable characters, and names stand in reports as [quoted] has them.
// TestNothingPrintsPast fails on any other way out.

// quoted returns a name as reports print it: as it is, or as a quoted Go string if it is empty, or
// holds a space, a quotation mark, a backslash, or anything that is not printable.
func quoted(name string) string {
	if name == "" || strings.ContainsAny(name, " \"\\") || printable(name) != name {
		return strconv.Quote(name)
	}
	return name
}

// printable returns text with everything that is not a printable character or a space in the form
// of a Go string's escape, so that it is one line and controls no terminal. Characters that are
// invisible or turn the direction of writing are not printable.
func printable(text string) string {
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

// printf is [fmt.Fprintf] for text that people read: what is printed of each argument is printable,
// and only format ends lines. It returns no error: a report goes through a buffer, and a reader of
// standard error that went away ends the command.
func printf(w io.Writer, format string, args ...any) {
	_, _ = fmt.Fprintf(w, format, shown(args)...)
}

// sprintf is [printf] into a string.
func sprintf(format string, args ...any) string { return fmt.Sprintf(format, shown(args)...) }

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
	if verb != 's' && verb != 'v' { // %q and %x escape by themselves
		_, _ = fmt.Fprintf(f, form, p.value)
		return
	}
	text := fmt.Sprintf("%"+string(verb), p.value)
	if _, ok := p.value.(error); ok {
		text = strings.ReplaceAll(text, "\n", "; ") // between the errors of a list
	}
	_, _ = fmt.Fprintf(f, strings.ReplaceAll(form, "v", "s"), printable(text))
}

// jsonText is a writer of JSON that escapes what is not printable, in the way of JSON: the values
// stay what they are. encoding/json and slog escape control characters below U+0020 alone. Each
// Write holds whole characters, as theirs do.
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

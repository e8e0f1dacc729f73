package clitest

import (
	"bytes"
	"io"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// forged is the line that Hostile tries to add to a report.
const forged = "forged   main   1   999"

// Hostile is a name that somebody else has chosen: it ends its line, forges another one, and
// controls the terminal, also with a C1 character, a change of the direction of writing, and a byte
// that is no character.
const Hostile = "k1\n" + forged + "\x1b[31m\t\r\u009b31m\u202e\x7f\xff"

// CheckPrintable fails unless text is lines of printable characters and tabs, none of them forged.
func CheckPrintable(t *testing.T, what, text string) {
	t.Helper()
	if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && r != '\t' && !strconv.IsPrint(r) }) {
		t.Errorf("%s has characters that are not printable: %q", what, text)
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "forged") {
			t.Errorf("%s has a forged line: %q", what, text)
		}
	}
}

// fill sets every string that v leads to, exported or not in JSON, to Hostile, and makes one
// element of each list.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(Hostile)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				fill(v.Field(i))
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
	case reflect.Bool, reflect.Int, reflect.Int64, reflect.Uint8, reflect.Uint64, reflect.Float64, reflect.Int32:
		v.SetZero()
	default:
		panic("fill: " + v.Type().String())
	}
}

// CheckReport prints a report, a pointer, with every string of it set to [Hostile], and fails
// unless the text is printable. A field that is added to a report is tried without a change of the
// test.
func CheckReport(t *testing.T, name string, report any, text func(io.Writer)) {
	t.Helper()
	for _, flags := range []bool{false, true} { // each of a report's booleans may show another part
		v := reflect.ValueOf(report).Elem()
		fill(v)
		if v.Kind() == reflect.Struct {
			for i := range v.NumField() {
				if f := v.Field(i); f.Kind() == reflect.Bool && f.CanSet() {
					f.SetBool(flags)
				}
			}
		}
		var b bytes.Buffer
		text(&b)
		CheckPrintable(t, name, b.String())
		if b.Len() == 0 {
			t.Errorf("%s printed nothing", name)
		}
	}
}

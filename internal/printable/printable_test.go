package printable_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

func TestName(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"key-1/2", "key-1/2"},
		{"/registry/secrets/default/größe-鍵", "/registry/secrets/default/größe-鍵"},
		{"aescbckey-2025-12-27T23:41:02+08:00", "aescbckey-2025-12-27T23:41:02+08:00"},
		{"", `""`},
		{"a b", `"a b"`},
		{`"a"`, `"\"a\""`},
		{`a\nb`, `"a\\nb"`},
		{"a\nb", `"a\nb"`},
		{"\x1b[31m", `"\x1b[31m"`},
		{"\u009b", `"\u009b"`},
		{"\u202eabc", `"\u202eabc"`},
		{"a\xffb", `"a\xffb"`},
		{"a\u00a0b", `"a\u00a0b"`},
	} {
		if got := printable.Name(c.name); got != c.want {
			t.Errorf("Name(%q) = %s, want %s", c.name, got, c.want)
		}
	}
}

type name string

func TestFprintf(t *testing.T) {
	for _, c := range []struct {
		format string
		args   []any
		want   string
	}{
		{"%s\n", []any{"a\nb"}, "a\\nb\n"},
		{"%v|%+v|%5s|%-5s|", []any{"a", "b\x1b", "c", "d"}, `a|b\x1b|    c|d    |`},
		{"%q %x", []any{"a\nb", "\x1b"}, `"a\nb" 1b`},
		{"%d %.1f %v %t %v", []any{3, 1.25, 2 * time.Second, true, nil}, "3 1.2 2s true <nil>"},
		{"%v", []any{errors.Join(errors.New("a"), fmt.Errorf("b: %w", errors.New("c\x1b")))}, `a; b: c\x1b`},
		{"%s", []any{name(clitest.Hostile[:3])}, `k1\n`},
		{"%s %v", []any{[]byte("a\n"), []string{"b\n"}}, `a\n [b\n]`},
		{"%v", []any{problem.Problem{Line: 1, Text: "a\n"}}, `line 1: a; `},
	} {
		var b bytes.Buffer
		printable.Fprintf(&b, c.format, c.args...)
		if b.String() != c.want {
			t.Errorf("printf(%q, %v) = %q, want %q", c.format, c.args, b.String(), c.want)
		}
	}
}

func TestJSON(t *testing.T) {
	for _, s := range []string{"", "größe 鍵", clitest.Hostile[:len(clitest.Hostile)-1], "\U000e0001 and \U0001f600"} {
		var b bytes.Buffer
		if err := json.NewEncoder(printable.JSON(&b)).Encode(s); err != nil {
			t.Fatal(err)
		}
		clitest.CheckPrintable(t, "JSON", b.String())
		var back string
		if err := json.Unmarshal(b.Bytes(), &back); err != nil || back != s {
			t.Errorf("%s is %q, %v; want %q", b.String(), back, err, s)
		}
	}
	for _, format := range []string{"json", "text"} {
		var b bytes.Buffer
		printable.NewLogger(&b, format, slog.LevelInfo).Info("a message", "keyID", clitest.Hostile, "error", errors.New(clitest.Hostile))
		clitest.CheckPrintable(t, format+" log", b.String())
	}
	if _, err := printable.JSON(failingWriter{}).Write([]byte("\u009b")); !errors.Is(err, errNoRoom) {
		t.Errorf("a writer that fails: %v", err)
	}
}

var errNoRoom = errors.New("no room")

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errNoRoom }

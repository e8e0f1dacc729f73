package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// forged is the line that hostile tries to add to a report.
const forged = "forged   main   1   999"

// hostile is a name that somebody else has chosen: it ends its line, forges another one, and
// controls the terminal, also with a C1 character, a change of the direction of writing, and a byte
// that is no character.
const hostile = "k1\n" + forged + "\x1b[31m\t\r\u009b31m\u202e\x7f\xff"

// checkPrintable fails unless text is lines of printable characters and tabs, none of them forged.
func checkPrintable(t *testing.T, what, text string) {
	t.Helper()
	if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && r != '\t' && unprintable(r) }) {
		t.Errorf("%s has characters that are not printable: %q", what, text)
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "forged") {
			t.Errorf("%s has a forged line: %q", what, text)
		}
	}
}

func TestQuoted(t *testing.T) {
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
		if got := quoted(c.name); got != c.want {
			t.Errorf("quoted(%q) = %s, want %s", c.name, got, c.want)
		}
	}
}

func TestPrintf(t *testing.T) {
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
		{"%s", []any{keyring.ValueState(hostile[:3])}, `k1\n`},
		{"%s %v", []any{[]byte("a\n"), []string{"b\n"}}, `a\n [b\n]`},
		{"%v", []any{config.Problem{Line: 1, Text: "a\n"}}, `line 1: a\n`},
	} {
		var b bytes.Buffer
		printf(&b, c.format, c.args...)
		if b.String() != c.want {
			t.Errorf("printf(%q, %v) = %q, want %q", c.format, c.args, b.String(), c.want)
		}
	}
}

func TestJSONText(t *testing.T) {
	for _, s := range []string{"", "größe 鍵", hostile[:len(hostile)-1], "\U000e0001 and \U0001f600"} {
		var b bytes.Buffer
		out := output("json")
		if err := out.write(&b, s, nil); err != nil {
			t.Fatal(err)
		}
		checkPrintable(t, "JSON", b.String())
		var back string
		if err := json.Unmarshal(b.Bytes(), &back); err != nil || back != s {
			t.Errorf("%s is %q, %v; want %q", b.String(), back, err, s)
		}
	}
	for _, format := range []string{"json", "text"} {
		var b bytes.Buffer
		newLogger(&b, format, logLevel("info")).Info("a message", "keyID", hostile, "error", errors.New(hostile))
		checkPrintable(t, format+" log", b.String())
	}
	if _, err := (jsonText{failingWriter{}}).Write([]byte("\u009b")); !errors.Is(err, errNoRoom) {
		t.Errorf("a writer that fails: %v", err)
	}
}

// fill sets every string that v leads to, exported or not in JSON, to hostile, and makes one
// element of each list.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(hostile)
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

// TestReportsQuote fills every string of every report with a hostile one. A field that is added to
// a report is tried without a change here.
func TestReportsQuote(t *testing.T) {
	for name, test := range map[string]struct {
		report any
		text   func(io.Writer, any)
	}{
		"status":       {&statusReport{}, func(w io.Writer, r any) { r.(*statusReport).text(w) }},
		"reencrypt":    {&reencryptReport{}, func(w io.Writer, r any) { r.(*reencryptReport).text(w) }},
		"kms check":    {&providerReport{}, func(w io.Writer, r any) { r.(*providerReport).text(w) }},
		"purge":        {&purgeReport{}, func(w io.Writer, r any) { r.(*purgeReport).text(w) }},
		"purge plan":   {&purgeReport{}, func(w io.Writer, r any) { r.(*purgeReport).plan(w) }},
		"verify":       {&verifyReport{}, func(w io.Writer, r any) { r.(*verifyReport).text(w, true) }},
		"kubeadm":      {&kubeadm.Status{}, func(w io.Writer, r any) { printNode(w, r.(*kubeadm.Status)) }},
		"audit verify": {&auditlog.Report{}, func(w io.Writer, r any) { printAuditReport(w, r.(*auditlog.Report)) }},
		"problem":      {&configProblem{}, func(w io.Writer, r any) { r.(*configProblem).print(w, "error", hostile) }},
		"value":        {&decryptedValue{}, func(w io.Writer, r any) { _ = r.(*decryptedValue).print(io.Discard, w, false) }},
		"error": {&struct{ Text, Hint string }{}, func(w io.Writer, r any) {
			(&failure{err: errors.Join(errors.New(hostile), errors.New(hostile)), hint: hostile}).print(w)
		}},
		"readyz": {&proxy.ReadyReport{}, func(w io.Writer, r any) { _, _ = io.WriteString(w, printableReport(*r.(*proxy.ReadyReport)).String()) }},
		"view": {&reencrypt.Result{}, func(w io.Writer, r any) {
			v := newReencryptView(w)
			v.say("waiting: another reencrypt is at work (%s)", hostile)
			v.paused(hostile, hostile)
			v.cost(*r.(*reencrypt.Result), nil)
		}},
	} {
		for _, flags := range []bool{false, true} { // each of a report's booleans may show another part
			fill(reflect.ValueOf(test.report).Elem())
			if v := reflect.ValueOf(test.report).Elem(); v.Kind() == reflect.Struct {
				for i := range v.NumField() {
					if f := v.Field(i); f.Kind() == reflect.Bool && f.CanSet() {
						f.SetBool(flags)
					}
				}
			}
			var b bytes.Buffer
			test.text(&b, test.report)
			checkPrintable(t, name, b.String())
			if b.Len() == 0 {
				t.Errorf("%s printed nothing", name)
			}
		}
	}
}

// TestNothingPrintsPast: whatever a command prints as text goes through printf.
func TestNothingPrintsPast(t *testing.T) {
	// What is written is not shown to anybody, or was made printable: the functions that do so
	// themselves, and a file that is being made.
	allowed := map[string]bool{"quote.go:printf": true, "quote.go:Format": true, "config_from_kubernetes.go:write": true}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range f.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || allowed[name+":"+fn.Name.Name] {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok {
					if x, ok := s.X.(*ast.Ident); ok && (x.Name == "fmt" && strings.Contains(s.Sel.Name, "rint") && !strings.HasPrefix(s.Sel.Name, "Sprint") ||
						x.Name == "io" && s.Sel.Name == "WriteString") {
						t.Errorf("%s: %s calls %s.%s: use printf", name, fn.Name.Name, x.Name, s.Sel.Name)
					}
				}
				return true
			})
		}
	}
}

// renamed is a KMS with one key, which it calls by another ID.
type renamed struct {
	*kmstest.Memory
	id string
}

func (r *renamed) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	res, err := r.Memory.Encrypt(ctx, uid, data)
	if err == nil {
		res.KeyID = r.id
	}
	return res, err
}

func (r *renamed) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	own, err := r.Memory.Status(ctx)
	if err != nil {
		return nil, err
	}
	return r.Memory.Decrypt(ctx, uid, &service.DecryptRequest{Ciphertext: req.Ciphertext, KeyID: own.KeyID, Annotations: req.Annotations})
}

func (r *renamed) Status(ctx context.Context) (*service.StatusResponse, error) {
	res, err := r.Memory.Status(ctx)
	if err == nil {
		res.KeyID = r.id
	}
	return res, err
}

// hostilePlugin is a KMS v2 plugin that answers with the key ID of testdata/key-id-control.json.
func hostilePlugin(t *testing.T) (endpoint, keyID string) {
	t.Helper()
	data, err := os.ReadFile("testdata/key-id-control.json")
	if err != nil {
		t.Fatal(err)
	}
	var answer struct {
		KeyID string `json:"keyID"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		t.Fatal(err)
	}
	return kmstest.PluginServer(t, &renamed{kmstest.NewMemory(), answer.KeyID}), answer.KeyID
}

// TestCheckQuotesKeyID: the key ID of a plugin neither forges a line nor reaches the terminal, and
// stays what it is in JSON.
func TestCheckQuotesKeyID(t *testing.T) {
	endpoint, keyID := hostilePlugin(t)
	path := newDir(t).config(t, "local: {keyFile: key.yaml}", "plugin: {endpoint: "+endpoint+"}")
	r := execute(t, "kms", "check", "--config", path)
	checkPrintable(t, "kms check", r.stdout+r.stderr)
	for line := range strings.Lines(r.stdout) {
		if strings.HasPrefix(line, "current") {
			t.Errorf("a forged line: %q", r.stdout)
		}
	}
	if want := fmt.Sprintf("%q", keyID); !strings.Contains(r.stdout, want) {
		t.Errorf("%s is not in\n%s", want, r.stdout)
	}
	var report struct {
		KMS []providerReport `json:"kms"`
	}
	if err := json.Unmarshal([]byte(execute(t, "kms", "check", "--config", path, "--output", "json").stdout), &report); err != nil || report.KMS[0].KeyID != keyID {
		t.Errorf("JSON: %+v, %v", report, err)
	}
}

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestReportsQuote: whatever the strings of a report hold, its text is printable.
func TestReportsQuote(t *testing.T) {
	check, node, log := new(providerReport), new(kubeadm.Status), new(auditlog.Report)
	clitest.CheckReport(t, "kms check", check, func(w io.Writer) { check.text(w) })
	clitest.CheckReport(t, "kubeadm", node, func(w io.Writer) { printNode(w, node) })
	clitest.CheckReport(t, "audit verify", log, func(w io.Writer) { printAuditReport(w, log) })
}

// TestNothingPrintsPast: whatever a command prints as text goes through package printable.
func TestNothingPrintsPast(t *testing.T) {
	// It writes a file.
	allowed := map[string]bool{"config_from_kubernetes.go:write": true}
	var files []string
	for _, pattern := range []string{"*.go", "*/*.go", "../server/*.go", "../encryption/*.go", "../provider/*.go", "../guard/*.go"} {
		some, err := filepath.Glob(pattern)
		if err != nil || len(some) == 0 {
			t.Fatal(pattern, err)
		}
		files = append(files, some...)
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
			if !ok || allowed[filepath.Base(name)+":"+fn.Name.Name] {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok {
					if x, ok := s.X.(*ast.Ident); ok && (x.Name == "fmt" && strings.Contains(s.Sel.Name, "rint") && !strings.HasPrefix(s.Sel.Name, "Sprint") ||
						x.Name == "io" && s.Sel.Name == "WriteString") {
						t.Errorf("%s: %s calls %s.%s: use package printable", name, fn.Name.Name, x.Name, s.Sel.Name)
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
	path := clitest.NewDir(t).Config(t, "local: {keyFile: key.yaml}", "plugin: {endpoint: "+endpoint+"}")
	r := execute(t, "kms", "check", "--config", path)
	clitest.CheckPrintable(t, "kms check", r.stdout+r.stderr)
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

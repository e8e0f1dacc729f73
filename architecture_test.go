// Package etcdkmsproxy holds no code; its test keeps the packages' import table true.
package etcdkmsproxy

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/etcd-kms-proxy/etcd-kms-proxy/"

// importTable says which packages of this module, and which modules beside the standard library, a folder may import. The
// longest folder that matches counts. docs/design/architecture.md explains the directions.
var importTable = map[string][]string{
	"cmd":                 {module + "internal/cli"},
	"internal/cli":        {module, "github.com/", "go.etcd.io/", "google.golang.org/", "golang.org/x/", "k8s.io/kms/"},
	"config":              {"go.yaml.in/yaml/v3", module + "config"},
	"crypto/envelope":     {"google.golang.org/protobuf/encoding/protowire"},
	"crypto/kubelegacy":   {"golang.org/x/crypto/nacl/secretbox", "google.golang.org/protobuf/encoding/protowire"},
	"crypto/keyring":      {module + "crypto/envelope", module + "kmsclient", "github.com/hashicorp/golang-lru/v2", "golang.org/x/sync/", "k8s.io/kms/"},
	"kmsclient":           {module + "kmsclient", module + "crypto/envelope", "k8s.io/kms/", "google.golang.org/grpc", "github.com/cenkalti/backoff/v5", "github.com/sony/gobreaker/v2"},
	"kmsclient/alibaba":   {module + "kmsclient", module + "internal/livefiles", "k8s.io/kms/", "github.com/aliyun/alibaba-cloud-sdk-go/"},
	"kmsclient/keyfile":   {"go.yaml.in/yaml/v3", module + "internal/secretfile"},
	"kmsclient/kmstest":   {module + "kmsclient", module + "crypto/envelope", "k8s.io/kms/", "google.golang.org/grpc"},
	"kmsclient/local":     {module + "kmsclient", "k8s.io/kms/"},
	"kmsclient/plugin":    {module + "kmsclient", module + "internal/unixsocket", "k8s.io/kms/", "google.golang.org/grpc"},
	"lifecycle":           {module + "lifecycle", module + "crypto/", module + "proxy/prefix", "github.com/cenkalti/backoff/v5", "go.etcd.io/etcd/", "google.golang.org/grpc", "golang.org/x/"},
	"lifecycle/etcdfile":  {"go.etcd.io/bbolt", "google.golang.org/protobuf/encoding/protowire"},
	"proxy":               {module + "proxy/etcdwire", module + "proxy/http2conn", module + "internal/livefiles", module + "proxy/prefix", module + "internal/unixsocket", "google.golang.org/", "go.etcd.io/etcd/", "github.com/prometheus/", "golang.org/x/", "go.uber.org/zap", "github.com/grpc-ecosystem/grpc-gateway/v2/runtime", "github.com/gorilla/websocket"},
	"proxy/etcdmodel":     {"go.etcd.io/etcd/api/v3/", "google.golang.org/"},
	"internal/auditlog":   {module + "internal/secretfile"},
	"proxy/http2conn":     {"golang.org/x/net/http2", "golang.org/x/sys/unix", "google.golang.org/grpc/mem"},
	"internal/kubeadm":    {"go.yaml.in/yaml/v3"},
	"internal/livefiles":  {}, // nothing but the standard library
	"internal/memlimit":   {}, // nothing but the standard library
	"proxy/prefix":        {}, // nothing but the standard library
	"internal/secretfile": {}, // nothing but the standard library
	"internal/unixsocket": {}, // nothing but the standard library
	"proxy/etcdwire":      {"google.golang.org/protobuf/encoding/protowire"},
}

// TestImportTable fails on an import that the table does not allow: in particular proxy never sees config, crypto or
// kmsclient, so that the data path can be read and tested without any of them.
func TestImportTable(t *testing.T) {
	files := 0
	for _, top := range []string{"cmd", "config", "crypto", "internal", "kmsclient", "lifecycle", "proxy"} {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			files++
			allowed := rowOf(filepath.ToSlash(filepath.Dir(path)))
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
			if err != nil {
				return err
			}
			for _, spec := range f.Imports {
				name, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					return err
				}
				if strings.Contains(strings.SplitN(name, "/", 2)[0], ".") && !hasPrefixOf(name, allowed) {
					t.Errorf("%s imports %s, which the import table does not allow", path, name)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if files == 0 {
		t.Fatal("no Go files found: the test looks in the wrong place")
	}
}

func rowOf(dir string) []string {
	for dir != "." {
		if row, ok := importTable[dir]; ok {
			return row
		}
		dir = filepath.ToSlash(filepath.Dir(dir))
	}
	return nil
}

func hasPrefixOf(name string, prefixes []string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// Package keyfile reads and makes files that hold keys as they are: those of local providers, and
// those that kube-apiserver's own providers encrypted with. Such a file is YAML, which only the
// user of the process and root can use (see [secretfile.Check]):
//
//	keys:
//	- {id: "1", secret: <base64>}
//
// [Form] is the name of the field that identifies a key. The package is independent of the use of
// the keys. Errors say what is wrong and on which line, and never hold a secret.
package keyfile

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/secretfile"
)

const (
	maxFileSize = 1 << 20
	maxIDSize   = 1024
)

// Form describes a kind of key file.
type Form struct {
	// ID is the name of the field that identifies a key.
	ID string
	// Sizes are the valid lengths of a secret in bytes.
	Sizes []int
	// Empty is the hint for a file without keys.
	Empty string
}

// Key is one key of a file.
type Key struct {
	ID     string
	Secret []byte
}

// Read reads and checks the file at path, and returns the file's metadata. A file
// that others can use is an error.
func Read(path string, form Form) ([]Key, fs.FileInfo, error) {
	data, info, err := secretfile.Read("key file", path, maxFileSize)
	if err != nil {
		return nil, nil, err
	}
	keys, err := Parse(data, form)
	clear(data)
	if err != nil {
		return nil, nil, fmt.Errorf("key file %s: %w", path, err)
	}
	return keys, info, nil
}

// Parse reads a file's YAML. All problems are reported at once, each with its line. The YAML
// library's own messages quote what they read, so only their line numbers are used.
func Parse(data []byte, form Form) ([]Key, error) {
	var file struct {
		Keys []yaml.Node `yaml:"keys"`
	}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		return nil, fmt.Errorf("not of the form `keys: [{%s: \"1\", secret: <base64 of %s bytes>}, …]`: no other fields, none twice", form.ID, form.sizes())
	}
	for {
		var next yaml.Node
		err := decoder.Decode(&next)
		if errors.Is(err, io.EOF) {
			break
		}
		// A trailing "---" begins an empty document.
		if err != nil || len(next.Content) != 1 || next.Content[0].Kind != yaml.ScalarNode || next.Content[0].Value != "" || next.Content[0].Style != 0 {
			return nil, errors.New("more than one YAML document")
		}
	}
	if len(file.Keys) == 0 {
		return nil, errors.New("it has no keys; " + form.Empty)
	}
	var keys []Key
	var problems []string
	seen := map[string]bool{}
	for i, node := range file.Keys {
		bad := func(format string, args ...any) {
			problems = append(problems, fmt.Sprintf("keys[%d], line %d: ", i, node.Line)+fmt.Sprintf(format, args...))
		}
		k, why := form.key(&node)
		switch {
		case why != "":
			bad("%s", why)
		case seen[k.ID]:
			bad("the %s %q is used twice", form.ID, k.ID)
		}
		seen[k.ID] = true
		keys = append(keys, k)
	}
	if problems != nil {
		return nil, errors.New(strings.Join(problems, "; "))
	}
	return keys, nil
}

// key reads one key; why says what is wrong with it, or is empty.
func (form Form) key(node *yaml.Node) (k Key, why string) {
	if node.Kind != yaml.MappingNode {
		return k, fmt.Sprintf("must have the fields %s and secret", form.ID)
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		name, value := node.Content[i].Value, node.Content[i+1]
		if seen[name] {
			return k, "has a field twice"
		}
		seen[name] = true
		if value.Kind != yaml.ScalarNode {
			return k, "has a field that is not text"
		}
		switch name {
		case form.ID:
			k.ID = value.Value
		case "secret":
			secret, err := base64.StdEncoding.DecodeString(value.Value)
			if err != nil {
				return k, "its secret is not base64"
			}
			k.Secret = secret
		default:
			return k, fmt.Sprintf("has a field other than %s and secret", form.ID)
		}
	}
	switch {
	case k.ID == "":
		return k, "has no " + form.ID
	case len(k.ID) > maxIDSize:
		return k, fmt.Sprintf("its %s is longer than %d bytes", form.ID, maxIDSize)
	case !slices.Contains(form.Sizes, len(k.Secret)):
		return k, fmt.Sprintf("its secret has %d bytes instead of %s", len(k.Secret), form.sizes())
	}
	return k, ""
}

func (form Form) sizes() string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(form.Sizes), " ", " or "), "[]")
}

// Line returns a key as a line of a file.
func (form Form) Line(k Key) string {
	return fmt.Sprintf("- {%s: %q, secret: %s}\n", form.ID, k.ID, base64.StdEncoding.EncodeToString(k.Secret))
}

// Create makes a file, readable by its owner only, and makes it last. It never replaces a file: the
// error then wraps [fs.ErrExist].
func Create(path, text string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // the operator names the file
	if err != nil {
		return fmt.Errorf("create key file: %w", err)
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	if _, err := f.WriteString(text); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	return SyncDir(path)
}

// SyncDir makes last that path is where it is.
func SyncDir(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("sync folder of key file: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sync folder of key file: %w", err)
	}
	return nil
}

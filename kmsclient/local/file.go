package local

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

const (
	secretSize  = 32
	maxFileSize = 1 << 20
	maxIDSize   = 1024
)

// version is one key of the file.
type version struct {
	id  string
	key []byte
}

// load reads and checks a key file, and returns what the open file said of itself.
func load(path string) ([]version, fs.FileInfo, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, nil, fmt.Errorf("read key file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("read key file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("key file %s: not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, nil, fmt.Errorf("key file %s: others than its owner may use it (mode %04o): run chmod 600 %s, and replace its keys if anyone did", path, mode, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, nil, fmt.Errorf("read key file: %w", err)
	}
	if len(data) > maxFileSize {
		return nil, nil, fmt.Errorf("key file %s: larger than %d bytes", path, maxFileSize)
	}
	versions, err := parse(data)
	clear(data)
	if err != nil {
		return nil, nil, fmt.Errorf("key file %s: %w", path, err)
	}
	return versions, info, nil
}

// parse reads a key file's YAML. All problems are reported at once, each with its line. The YAML library's own messages quote what they
// read, so only their line numbers are used.
func parse(data []byte) ([]version, error) {
	var file struct {
		Keys []yaml.Node `yaml:"keys"`
	}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		return nil, errors.New("not of the form `keys: [{id: \"1\", secret: <base64 of 32 bytes>}, …]`: no other fields, none twice")
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one YAML document")
	}
	if len(file.Keys) == 0 {
		return nil, errors.New("it has no keys; etcd-kms-proxy kms new-local-key adds one")
	}
	var versions []version
	var problems []string
	seen := map[string]bool{}
	for i, node := range file.Keys {
		bad := func(format string, args ...any) {
			problems = append(problems, fmt.Sprintf("keys[%d], line %d: ", i, node.Line)+fmt.Sprintf(format, args...))
		}
		v, why := parseVersion(&node)
		switch {
		case why != "":
			bad("%s", why)
		case seen[v.id]:
			bad("the id %q stands there twice", v.id)
		}
		seen[v.id] = true
		versions = append(versions, v)
	}
	if problems != nil {
		return nil, errors.New(strings.Join(problems, "; "))
	}
	return versions, nil
}

// parseVersion reads one key; why says what is wrong with it, or is empty.
func parseVersion(node *yaml.Node) (v version, why string) {
	if node.Kind != yaml.MappingNode {
		return v, "must have the fields id and secret"
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		name, value := node.Content[i].Value, node.Content[i+1]
		if seen[name] {
			return v, "has a field twice"
		}
		seen[name] = true
		if value.Kind != yaml.ScalarNode {
			return v, "has a field that is not text"
		}
		switch name {
		case "id":
			v.id = value.Value
		case "secret":
			key, err := base64.StdEncoding.DecodeString(value.Value)
			if err != nil {
				return v, "its secret is not base64"
			}
			v.key = key
		default:
			return v, "has a field other than id and secret"
		}
	}
	switch {
	case v.id == "":
		return v, "has no id"
	case len(v.id) > maxIDSize:
		return v, fmt.Sprintf("its id is longer than %d bytes", maxIDSize)
	case len(v.key) != secretSize:
		return v, fmt.Sprintf("its secret has %d bytes instead of %d", len(v.key), secretSize)
	}
	return v, ""
}

func line(id string, secret []byte) string {
	return fmt.Sprintf("- {id: %q, secret: %s}\n", id, base64.StdEncoding.EncodeToString(secret))
}

// NewKeyFile makes a key file with one key, readable by its owner only. It never replaces a file: the error then wraps [fs.ErrExist].
func NewKeyFile(path string) error {
	return write(path, "# Keys of etcd-kms-proxy. The last one wraps, all unwrap. Never remove one that a stored value still needs.\nkeys:\n"+line("1", newSecret()))
}

// AddVersion adds a key to a key file, which then wraps. The file is replaced at once, so that a reader sees the old one or the new one;
// comments, order and owner stay. Of a symbolic link, the target is replaced.
func AddVersion(path string) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("read key file: %w", err)
	}
	versions, info, err := load(path)
	if err != nil {
		return err
	}
	highest := 0
	for _, v := range versions {
		clear(v.key)
		if n, err := strconv.Atoi(v.id); err == nil && n > highest {
			highest = n
		}
	}
	highest = max(highest, len(versions))
	old, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read key file: %w", err)
	}
	if len(old) > 0 && old[len(old)-1] != '\n' {
		old = append(old, '\n')
	}
	text := string(old) + line(strconv.Itoa(highest+1), newSecret())
	if _, err := parse([]byte(text)); err != nil { // e.g. a list written as [{…}, {…}]
		return fmt.Errorf("key file %s: a line cannot be added to it; write each key on a line of its own that begins with `- {`", path)
	}
	temp := path + ".new"
	if err := write(temp, text); err != nil {
		return err
	}
	// The proxy must be able to read what root made in its name.
	if err := keepOwner(temp, info); err != nil {
		return fmt.Errorf("key file %s: its owner is another user, who could not read the new one; run this as that user: %w", path, errors.Join(err, os.Remove(temp)))
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("replace key file: %w", errors.Join(err, os.Remove(temp)))
	}
	return syncDir(path)
}

// write makes a file that must not exist and makes it last.
func write(path, text string) (err error) {
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
	return syncDir(path)
}

func syncDir(path string) error {
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

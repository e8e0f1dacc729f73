package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/keyfile"
)

const secretSize = 32

// form describes the key files of local providers.
var form = keyfile.Form{ID: "id", Sizes: []int{secretSize}, Empty: "etcd-kms-proxy kms new-local-key adds one"}

func line(id string, secret []byte) string { return form.Line(keyfile.Key{ID: id, Secret: secret}) }

// NewKeyFile creates a key file with one key, readable only by its owner. If the file exists, the
// error wraps [fs.ErrExist].
func NewKeyFile(path string) error {
	return keyfile.Create(path, "# Keys of etcd-kms-proxy. The last one wraps, all unwrap. Never remove one that a stored value still needs.\nkeys:\n"+line("1", newSecret()))
}

// AddVersion adds a key to a key file, which then wraps. It replaces the file atomically and keeps
// comments, order, owner and mode. If the path is a symbolic link, it replaces the target.
func AddVersion(path string) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("read key file: %w", err)
	}
	versions, info, err := keyfile.Read(path, form)
	if err != nil {
		return err
	}
	highest := 0
	for _, v := range versions {
		clear(v.Secret)
		if n, err := strconv.Atoi(v.ID); err == nil && n > highest {
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
	// e.g. a list written as [{…}, {…}]
	if _, err := keyfile.Parse([]byte(text), form); err != nil {
		return fmt.Errorf("key file %s: a line cannot be added to it; write each key on a line of its own that begins with `- {`", path)
	}
	temp := path + ".new"
	if err := keyfile.Create(temp, text); errors.Is(err, fs.ErrExist) {
		return problem.New("another new-local-key is running, or one was interrupted before it had changed the key file; if none is running, remove "+temp, "%s exists", temp)
	} else if err != nil {
		return err
	}
	// The proxy must be able to read a file that root created for it.
	if err := keepOwner(temp, info); err != nil {
		return fmt.Errorf("key file %s: its owner is another user, who could not read the new one; run this as that user: %w", path, errors.Join(err, os.Remove(temp)))
	}
	if err := os.Chmod(temp, info.Mode().Perm()); err != nil {
		return fmt.Errorf("set the mode of the new key file: %w", errors.Join(err, os.Remove(temp)))
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("replace key file: %w", errors.Join(err, os.Remove(temp)))
	}
	return keyfile.SyncDir(path)
}

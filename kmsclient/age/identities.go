package age

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"filippo.io/age"
	"filippo.io/age/armor"
	"filippo.io/age/plugin"
)

// maxIdentityFile bounds an identity file, in bytes.
const maxIdentityFile = 1 << 20

// ErrNoIdentity reports that none of the identities belongs to a recipient of an age file.
var ErrNoIdentity = errors.New("none of the identities opens this recovery copy: it was made for other recipients")

// Prompter asks a person.
type Prompter struct {
	// Passphrase asks for the passphrase of the identity file. The caller clears the result.
	Passphrase func(file string) ([]byte, error)
	// Plugin is the user interface of age plugins, such as those of hardware tokens.
	Plugin *plugin.ClientUI
}

// Identities are private keys that unwrap what [Recipients] wrapped. They are safe for concurrent
// use; a plugin is called for one file at a time, since it may ask a person to touch a token.
type Identities struct {
	all []age.Identity

	mu      sync.Mutex // serializes plugins
	plugins bool
}

// ReadIdentities reads an identity file as age does: lines of AGE-SECRET-KEY-1…,
// AGE-SECRET-KEY-PQ-1… or AGE-PLUGIN-…, or an age file (binary or armored) that holds such lines
// and is protected by a passphrase. Its errors never quote the file.
func ReadIdentities(name string, prompt Prompter) (*Identities, error) {
	f, err := os.Open(name) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("read identity file: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxIdentityFile+1))
	defer func() { clear(text) }()
	if err != nil {
		return nil, fmt.Errorf("read identity file: %w", err)
	}
	if len(text) > maxIdentityFile {
		return nil, fmt.Errorf("read identity file %s: it is larger than %d bytes", name, maxIdentityFile)
	}
	if armored := bytes.HasPrefix(bytes.TrimSpace(text), []byte(armor.Header)); armored || isWrapped(text) {
		plain, err := openProtected(name, text, armored, prompt)
		if err != nil {
			return nil, fmt.Errorf("read identity file %s: %w", name, err)
		}
		defer clear(plain)
		text = plain
	}
	ids, err := parseIdentities(text, prompt)
	if err != nil {
		return nil, fmt.Errorf("read identity file %s: %w", name, err)
	}
	return ids, nil
}

// Join returns the identities of several files as one set.
func Join(sets ...*Identities) *Identities {
	all := &Identities{}
	for _, ids := range sets {
		all.all, all.plugins = append(all.all, ids.all...), all.plugins || ids.plugins
	}
	return all
}

// openProtected decrypts an identity file that a passphrase protects.
func openProtected(name string, text []byte, armored bool, prompt Prompter) ([]byte, error) {
	if prompt.Passphrase == nil {
		return nil, errors.New("it is protected by a passphrase, and there is no terminal to enter it on")
	}
	passphrase, err := prompt.Passphrase(name)
	if err != nil {
		return nil, fmt.Errorf("read the passphrase: %w", err)
	}
	defer clear(passphrase)
	identity, err := age.NewScryptIdentity(string(passphrase))
	if err != nil {
		return nil, errors.New("the passphrase is empty")
	}
	var r io.Reader = bytes.NewReader(text)
	if armored {
		r = armor.NewReader(r)
	}
	r, err = age.Decrypt(r, identity)
	if err == nil {
		var plain []byte
		if plain, err = io.ReadAll(io.LimitReader(r, maxIdentityFile)); err == nil {
			return plain, nil
		}
	}
	if _, ok := errors.AsType[*age.NoIdentityMatchError](err); ok {
		return nil, errors.New("the passphrase is wrong, or the file is protected by something else than a passphrase")
	}
	return nil, errors.New("the file is damaged")
}

func parseIdentities(text []byte, prompt Prompter) (*Identities, error) {
	ids := &Identities{}
	for i, line := range lines(text) {
		var id age.Identity
		var err error
		switch {
		case strings.HasPrefix(line, "age1"):
			return nil, fmt.Errorf("line %d is a recipient, which is public; an identity begins with AGE-SECRET-KEY- or AGE-PLUGIN-", i+1)
		case strings.HasPrefix(line, "AGE-PLUGIN-"):
			if prompt.Plugin == nil {
				return nil, fmt.Errorf("line %d needs a plugin, and there is no terminal for it", i+1)
			}
			id, err = plugin.NewIdentity(line, prompt.Plugin)
			ids.plugins = true
		case strings.HasPrefix(line, "AGE-SECRET-KEY-PQ-1"):
			id, err = age.ParseHybridIdentity(line)
		default:
			id, err = age.ParseX25519Identity(line)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d is not an age identity", i+1)
		}
		ids.all = append(ids.all, id)
	}
	if len(ids.all) == 0 {
		return nil, errors.New("it holds no identity")
	}
	return ids, nil
}

// Unwrap returns the DEK seed in an age file that [Recipients.Wrap] made. The caller owns the
// result. The error is [ErrNoIdentity] if the file was made for other recipients.
func (ids *Identities) Unwrap(file []byte) ([]byte, error) {
	if err := CheckWrapped(file); err != nil {
		return nil, err
	}
	if ids.plugins {
		ids.mu.Lock()
		defer ids.mu.Unlock()
	}
	r, err := age.Decrypt(bytes.NewReader(file), ids.all...)
	if err != nil {
		if missing, ok := errors.AsType[*plugin.NotFoundError](err); ok {
			return nil, fmt.Errorf("the program age-plugin-%s of an identity was not found in PATH", missing.Name)
		}
		if _, ok := errors.AsType[*age.NoIdentityMatchError](err); ok {
			return nil, ErrNoIdentity
		}
		return nil, errors.New("the age file is damaged, or a plugin of an identity failed")
	}
	return readSeed(r)
}

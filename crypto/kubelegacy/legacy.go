// Package kubelegacy opens the values that kube-apiserver stored with its own providers aescbc,
// aesgcm and secretbox, so that a cluster can be moved off them. It never seals. It does no I/O:
// keys are given to it. The command makes a [Reader] for each such provider, crypto/keyring asks
// it.
//
// # Stored bytes
//
// As k8s.io/apiserver has them (pkg/server/options/encryptionconfig, pkg/storage/value/encrypt):
//
//	k8s:enc:<type>:v1:<key name>:<payload>
//
//	aescbc     IV[16] | AES-CBC of the value and 1 to 16 bytes of padding, each of which is their number
//	aesgcm     nonce[12] | AES-GCM ciphertext | tag[16], with the etcd key as additional data
//	secretbox  nonce[24] | Poly1305 tag[16] | XSalsa20 ciphertext
//
// Only aesgcm binds a value to its etcd key. secretbox does not, and aescbc has no integrity at
// all: see [Reader.Open] for what is checked instead.
package kubelegacy

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/crypto/nacl/secretbox"
)

// Type is one of kube-apiserver's providers, as an EncryptionConfiguration spells it.
type Type string

// The types.
const (
	AESCBC    Type = "aescbc"
	AESGCM    Type = "aesgcm"
	Secretbox Type = "secretbox"
)

// KeySizes returns the lengths in bytes that a key of the type may have, or nil for an unknown
// type. kube-apiserver takes the same.
func (t Type) KeySizes() []int {
	switch t {
	case AESCBC, AESGCM:
		return []int{16, 24, 32}
	case Secretbox:
		return []int{32}
	}
	return nil
}

// Key is a key with the name that stands in the values sealed with it.
type Key struct {
	Name   string
	Secret []byte
}

// Config configures a Reader.
type Config struct {
	// Type is the provider whose values the reader opens.
	Type Type
	// Keys open values by their names. New does not retain the secrets; it keeps ciphers made of
	// them.
	Keys []Key
	// Source is where the keys are from, a file for example. It stands in errors, for an operator
	// to add a key there.
	Source string
}

// Reader opens the values of one provider. It is safe for concurrent use.
type Reader struct {
	typ    Type
	source string
	keys   []key
}

type key struct {
	prefix []byte // "<name>:"
	open   opener
}

// opener returns the plaintext of a payload, as new bytes, or false. It leaves the payload as it
// is.
type opener func(etcdKey, payload []byte) ([]byte, bool)

// New makes a Reader. Its errors never hold a secret.
func New(c Config) (*Reader, error) {
	sizes := c.Type.KeySizes()
	if sizes == nil {
		return nil, fmt.Errorf("make reader: %q is not one of aescbc, aesgcm and secretbox", c.Type)
	}
	if len(c.Keys) == 0 {
		return nil, fmt.Errorf("make reader of %s: no keys", c.Type)
	}
	r := &Reader{typ: c.Type, source: c.Source}
	for _, k := range c.Keys {
		if k.Name == "" {
			return nil, fmt.Errorf("make reader of %s: a key has no name", c.Type)
		}
		if !slices.Contains(sizes, len(k.Secret)) {
			return nil, fmt.Errorf("make reader of %s: key %q has %d bytes", c.Type, k.Name, len(k.Secret))
		}
		open, err := newOpener(c.Type, k.Secret)
		if err != nil {
			return nil, fmt.Errorf("make reader of %s: key %q: %w", c.Type, k.Name, err)
		}
		r.keys = append(r.keys, key{prefix: []byte(k.Name + ":"), open: open})
	}
	return r, nil
}

func newOpener(t Type, secret []byte) (opener, error) {
	if t == Secretbox {
		return secretboxOpener([32]byte(secret)), nil
	}
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, err
	}
	if t == AESCBC {
		return cbcOpener(block), nil
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return gcmOpener(aead), nil
}

// Marker returns what the reader's values begin with: "k8s:enc:aescbc:v1:" for example.
func (r *Reader) Marker() string { return r.typ.marker() }

// errCorrupt is every failure of a value whose key is known: who can write to etcd and sees errors
// must not learn where decryption ended.
var errCorrupt = errors.New("it does not open with that key: it was altered, cut or moved, or the key is another one of the same name")

// Open returns the plaintext of stored, the bytes that etcd holds under etcdKey, as new bytes. It
// retains neither argument and leaves both as they are. known is false if the value names no key of
// the reader's: with that key added, it may open. It is true with every other error, and all
// failures to decrypt have one and the same error.
//
// A value may fit several keys, as names may hold colons; they are tried in order, as
// kube-apiserver does.
//
// aescbc cannot tell a value that was altered, or opened with a wrong key, from a good one: one in
// 256 has good padding by chance. So all of what it opens must be an object as kube-apiserver
// stores it, in protobuf, JSON or CBOR, read strictly from its first byte to its last. Otherwise a
// wrong key would turn values into noise that is then encrypted again as if it were theirs, and
// whoever can write to etcd could learn values by altering them and looking which ones open (a
// padding oracle): as it is, several bytes beside the padding have to be right at once. Within
// these bounds objects can still be altered: bits of a block can be flipped at the price of
// garbling the one before.
//
// aescbc and secretbox do not bind a value to its etcd key. An object that has a name must stand
// under a key that ends with its namespace and name, so that one that was moved is refused; that an
// older one was put back under the same key, or moved to that of an object of another resource with
// the same name, cannot be seen.
func (r *Reader) Open(etcdKey, stored []byte) (plaintext []byte, known bool, err error) {
	rest, ok := bytes.CutPrefix(stored, []byte(r.Marker()))
	if !ok {
		return nil, true, fmt.Errorf("it does not begin with the marker of %s", r.typ)
	}
	for _, k := range r.keys {
		payload, ok := bytes.CutPrefix(rest, k.prefix)
		if !ok {
			continue
		}
		known = true
		if plaintext, ok := k.open(etcdKey, payload); ok {
			return plaintext, true, nil
		}
	}
	if known {
		return nil, true, errCorrupt
	}
	end := r.typ.nameEnd(rest)
	if end < 0 {
		return nil, true, errors.New("it ends within the name of its key")
	}
	return nil, false, fmt.Errorf("it was sealed with %s key %s, which %s does not have: add that key there", r.typ, quote(rest[:end]), r.source)
}

// quote makes text out of stored bytes that should be a name.
func quote(name []byte) string {
	const most = 128
	if len(name) > most {
		return fmt.Sprintf("%q…", name[:most])
	}
	return fmt.Sprintf("%q", name)
}

func secretboxOpener(k [32]byte) opener {
	return func(etcdKey, payload []byte) ([]byte, bool) {
		const nonceSize = 24
		if len(payload) < nonceSize+secretbox.Overhead {
			return nil, false
		}
		nonce := [nonceSize]byte(payload[:nonceSize])
		box := payload[nonceSize:]
		plaintext, ok := secretbox.Open(make([]byte, 0, len(box)-secretbox.Overhead), box, &nonce, &k)
		if o, isObject := parseObject(plaintext); ok && isObject && !o.fits(etcdKey) {
			return nil, false
		}
		return plaintext, ok
	}
}

func gcmOpener(aead cipher.AEAD) opener {
	return func(etcdKey, payload []byte) ([]byte, bool) {
		n := aead.NonceSize()
		if len(payload) < n+aead.Overhead() {
			return nil, false
		}
		plaintext, err := aead.Open(make([]byte, 0, len(payload)-n-aead.Overhead()), payload[:n], payload[n:], etcdKey)
		return plaintext, err == nil
	}
}

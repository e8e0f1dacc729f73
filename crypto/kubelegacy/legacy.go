// Package kubelegacy decrypts the values that kube-apiserver stored with its own providers aescbc,
// aesgcm and secretbox, so that a cluster can be migrated from them. It never encrypts, and does no
// I/O: the caller passes the keys. The server makes a [Reader] for each such provider, and
// crypto/rule calls it.
//
// # Stored bytes
//
// As in k8s.io/apiserver (pkg/server/options/encryptionconfig, pkg/storage/value/encrypt):
//
//	k8s:enc:<type>:v1:<key name>:<payload>
//
//	aescbc     IV[16] | AES-CBC of the value and its PKCS #7 padding of 1 to 16 bytes
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

// KeySizes returns the valid key lengths of the type in bytes, or nil for an unknown type. They are
// those of kube-apiserver.
func (t Type) KeySizes() []int {
	switch t {
	case AESCBC, AESGCM:
		return []int{16, 24, 32}
	case Secretbox:
		return []int{32}
	}
	return nil
}

// Key is a key with its name, which is part of the values encrypted with it.
type Key struct {
	Name   string
	Secret []byte
}

// Config configures a Reader.
type Config struct {
	// Type is the provider whose values the reader decrypts.
	Type Type
	// Keys decrypt the values that name them. New does not retain the secrets; it keeps ciphers
	// made from them.
	Keys []Key
	// Source is where the keys are from, a file for example. Errors name it, so that the operator
	// knows where to add a key.
	Source string
}

// Reader decrypts the values of one provider. It is safe for concurrent use.
type Reader struct {
	typ    Type
	source string
	keys   []key
}

type key struct {
	prefix []byte // "<name>:"
	open   opener
}

// opener returns the plaintext of a payload in new memory, or false. It does not change the
// payload.
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

// Marker returns the prefix of the reader's values: "k8s:enc:aescbc:v1:" for example.
func (r *Reader) Marker() string { return r.typ.marker() }

// errCorrupt is the error of every failure to decrypt with a configured key. An attacker who can
// write to etcd and sees errors must not learn which step failed.
var errCorrupt = errors.New("it does not decrypt with that key: it was altered, truncated or moved, or the key is another one of the same name")

// Open returns the plaintext of stored, the value of etcdKey in etcd, in new memory. It neither
// retains nor changes its arguments. known is false if the value names a key that the reader does
// not have: with that key, the value may be decrypted. known is true with every other error, and
// all failures to decrypt have the same error.
//
// A value may match several keys, because names may contain colons. They are tried in order, as in
// kube-apiserver.
//
// aescbc does not detect that a value was altered, or decrypted with a wrong key: one in 256 has
// valid padding by chance. Therefore its plaintext must be an object as kube-apiserver stores it,
// in protobuf, JSON or CBOR, which is parsed strictly from the first byte to the last. Without this
// check, a wrong key would turn values into noise that is then encrypted again. And an attacker who
// can write to etcd could learn values by altering them and observing which ones decrypt (a padding
// oracle). With it, several bytes in addition to the padding have to be right at once. An attacker
// can still flip bits of a block, which garbles the block before it.
//
// aescbc and secretbox do not bind a value to its etcd key. The etcd key of an object with a name
// must end with its namespace and name, so that an object that was moved is refused. It is not
// detected if an older value was put back under the same key, or moved to the key of another
// resource's object with the same name.
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
	return nil, false, fmt.Errorf("it was encrypted with %s key %s, which %s does not have: add that key there", r.typ, quote(rest[:end]), r.source)
}

// quote returns stored bytes that should be a name as printable text.
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

package kmsdouble

import (
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// The key of a double whose Config names none.
const (
	DefaultKeyID = "key-hzz65f1cb66fa42qo7z8w"
	DefaultAlias = "alias/etcd"
)

// KeyConfig describes a key to add.
type KeyConfig struct {
	ID    string // by default a new one
	Alias string // "alias/…", or none
	State State  // Enabled by default
	// MaterialExpires is when imported material ends, and the key waits for an import; zero for a
	// key of the KMS' own.
	MaterialExpires time.Time
	// Careless is for a key that is neither protected from deletion nor rotated by the KMS.
	Careless bool
	// HSM is for a key that is protected by hardware.
	HSM bool
	// Default is for a key that belongs to a product of the cloud, which the KMS refuses to
	// applications.
	Default bool
	// Version and Secret are of its first version; by default they are random.
	Version string
	Secret  [32]byte
}

// key is a key with its versions; the last one is the primary.
type key struct {
	id              string
	state           State
	created         time.Time
	deleteAt        time.Time
	materialExpires time.Time
	careless        bool
	hsm, product    bool
	versions        []keyVersion
}

type keyVersion struct {
	id      string
	created time.Time
	secret  [32]byte
}

func (k *key) primary() keyVersion { return k.versions[len(k.versions)-1] }

func (k *key) addVersion(now time.Time) string {
	v := keyVersion{id: newUUID(), created: now}
	_, _ = rand.Read(v.secret[:])
	k.versions = append(k.versions, v)
	return v.id
}

// AddKey adds a key with one version.
func (d *Double) AddKey(c KeyConfig) error {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	k := &key{
		id: cmp.Or(c.ID, "key-"+strings.ReplaceAll(newUUID(), "-", "")[:22]), state: cmp.Or(c.State, Enabled), created: d.now(),
		materialExpires: c.MaterialExpires, careless: c.Careless, hsm: c.HSM, product: c.Default,
	}
	if _, taken := d.keys[k.id]; taken {
		return fmt.Errorf("key %s exists", k.id)
	}
	if c.Version == "" {
		k.addVersion(k.created)
	} else {
		k.versions = []keyVersion{{id: c.Version, created: k.created, secret: c.Secret}}
	}
	d.keys[k.id] = k
	if c.Alias != "" {
		d.aliases[c.Alias] = k.id
	}
	return nil
}

// SetAlias points an alias at a key.
func (d *Double) SetAlias(alias, keyID string) {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	d.aliases[alias] = keyID
}

// RemoveAlias deletes an alias; its key stays.
func (d *Double) RemoveAlias(alias string) {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	delete(d.aliases, alias)
}

// Rotate gives a key a new primary version and returns its id; the old ones still decrypt. It
// panics on an unknown key.
func (d *Double) Rotate(keyID string) string {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	return d.mustKey(keyID).addVersion(d.now())
}

// Unprotect turns off a key's deletion protection and automatic rotation. It panics on an unknown
// key.
func (d *Double) Unprotect(keyID string) {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	d.mustKey(keyID).careless = true
}

// RemoveKey deletes a key, as happens at the end of PendingDeletion.
func (d *Double) RemoveKey(keyID string) {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	delete(d.keys, keyID)
}

// PrimaryKeyID returns "<key id>/<primary version id>". It panics on an unknown key.
func (d *Double) PrimaryKeyID(keyID string) string {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	k := d.mustKey(keyID)
	return k.id + "/" + k.primary().id
}

func (d *Double) mustKey(keyID string) *key {
	k := d.keys[keyID]
	if k == nil {
		panic("kmsdouble: no key " + keyID)
	}
	return k
}

// find resolves a request's KeyId: an id, an alias or an ARN. d.keysMu is held.
func (d *Double) find(name string) (*key, *apiError) {
	if name == "" {
		return nil, missing("KeyId")
	}
	if rest, ok := strings.CutPrefix(name, "acs:kms:"); ok {
		region, rest, _ := strings.Cut(rest, ":")
		_, resource, _ := strings.Cut(rest, ":")
		if region != d.region {
			return nil, &apiError{404, "Forbidden.KeyNotFound", "The specified Key is not found."}
		}
		name = strings.TrimPrefix(resource, "key/")
	}
	if strings.HasPrefix(name, "alias/") {
		id, ok := d.aliases[name]
		if !ok {
			return nil, &apiError{404, "Forbidden.AliasNotFound", "The specified Alias is not found."}
		}
		name = id
	}
	if k := d.keys[name]; k != nil {
		return k, nil
	}
	return nil, &apiError{404, "Forbidden.KeyNotFound", "The specified Key is not found."}
}

// A CiphertextBlob is the base64 of
//
//	len(key id) uint8 | key id | version id [36] | nonce [12] | AES-256-GCM ciphertext and tag
//
// with the canonical EncryptionContext as additional data.

func (k *key) seal(plaintext []byte, context string) (string, error) {
	v := k.primary()
	aead, err := v.aead()
	if err != nil {
		return "", err
	}
	blob := append([]byte{byte(len(k.id))}, k.id...)
	blob = append(blob, v.id...)
	nonce := make([]byte, aead.NonceSize())
	_, _ = rand.Read(nonce)
	blob = append(blob, nonce...)
	return base64.StdEncoding.EncodeToString(aead.Seal(blob, nonce, plaintext, []byte(context))), nil
}

// open is the inverse of seal, for any key and version of the double. d.keysMu is held.
func (d *Double) open(blob, context string) (*key, keyVersion, []byte, *apiError) {
	invalid := &apiError{400, "InvalidParameter", "The specified parameter CiphertextBlob is not valid."}
	raw, err := base64.StdEncoding.Strict().DecodeString(blob)
	if err != nil || len(raw) < 1 {
		return nil, keyVersion{}, nil, invalid
	}
	n, raw := int(raw[0]), raw[1:]
	if len(raw) < n+36+12+16 {
		return nil, keyVersion{}, nil, invalid
	}
	id, raw := raw[:n], raw[n:]
	versionID, nonce, sealed := string(raw[:36]), raw[36:48], raw[48:]
	k := d.keys[string(id)]
	if k == nil {
		return nil, keyVersion{}, nil, &apiError{404, "Forbidden.KeyNotFound", "The specified Key is not found."}
	}
	if e := k.usable(d.now()); e != nil {
		return k, keyVersion{}, nil, e
	}
	for _, v := range k.versions {
		if v.id != versionID {
			continue
		}
		aead, err := v.aead()
		if err != nil {
			return k, v, nil, invalid
		}
		plaintext, err := aead.Open(nil, nonce, sealed, []byte(context))
		if err != nil {
			return k, v, nil, invalid
		}
		return k, v, plaintext, nil
	}
	return k, keyVersion{}, nil, invalid
}

func (v keyVersion) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(v.secret[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// canonicalContext returns an EncryptionContext without regard to the order in which its keys were
// given.
func canonicalContext(text string) (string, *apiError) {
	if text == "" {
		return "", nil
	}
	invalid := &apiError{400, "InvalidParameter", "The specified parameter EncryptionContext is not valid."}
	if len([]rune(text)) > 8192 {
		return "", invalid
	}
	var m map[string]string
	if err := json.Unmarshal([]byte(text), &m); err != nil || m == nil {
		return "", invalid
	}
	canonical, err := json.Marshal(m)
	if err != nil {
		return "", invalid
	}
	return string(canonical), nil
}

// newUUID returns a random version 4 UUID.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	s := hex.EncodeToString(b[:])
	return strings.Join([]string{s[:8], s[8:12], s[12:16], s[16:20], s[20:]}, "-")
}

// VersionOf returns the key ID ("<key id>/<version id>") that a CiphertextBlob of a double says it
// was made under.
func VersionOf(blob []byte) (string, error) {
	raw, err := base64.StdEncoding.DecodeString(string(blob))
	if err != nil || len(raw) < 1 || len(raw) < 1+int(raw[0])+36 {
		return "", errors.New("not a CiphertextBlob of a double")
	}
	n, raw := int(raw[0]), raw[1:]
	return string(raw[:n]) + "/" + string(raw[n:n+36]), nil
}

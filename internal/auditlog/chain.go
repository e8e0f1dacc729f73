package auditlog

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/secretfile"
)

// sum is a hash of the chain.
type sum [sha256.Size]byte

func (s sum) String() string { return hex.EncodeToString(s[:]) }

// parseSum reads what String wrote. Other spellings are refused, or a change of case would go
// unseen.
func parseSum(text string) (s sum, ok bool) {
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw) != len(s) {
		return s, false
	}
	copy(s[:], raw)
	return s, s.String() == text
}

const (
	minKey = 32
	maxKey = 4096
)

// LoadKey reads the key of a chain: all bytes of a file, 32 to 4,096, that no other user can read.
// The key is for [Config] or [VerifyOptions].
func LoadKey(path string) ([]byte, error) {
	key, _, err := secretfile.Read("audit key", path, maxKey+1) // checkKey names both limits
	if err != nil {
		return nil, err
	}
	if err := checkKey(key); err != nil {
		return nil, fmt.Errorf("audit key %s: %w", path, err)
	}
	return key, nil
}

func checkKey(key []byte) error {
	if len(key) < minKey || len(key) > maxKey {
		return fmt.Errorf("it does not have %d to %d bytes: head -c 32 /dev/urandom makes a key", minKey, maxKey)
	}
	return nil
}

// chain computes hashes. The zero value is a chain without a key.
type chain struct {
	key []byte
	id  string // as in chainKey; "" without a key
}

func newChain(key []byte) (chain, error) {
	if key == nil {
		return chain{}, nil
	}
	if err := checkKey(key); err != nil {
		return chain{}, fmt.Errorf("audit key: %w", err)
	}
	h := hmac.New(sha256.New, key)
	h.Write([]byte("etcd-kms-proxy audit chain key"))
	return chain{key: key, id: hex.EncodeToString(h.Sum(nil)[:8])}, nil
}

// next is the hash of a record with this body after a record with the hash previous.
func (c chain) next(previous sum, body []byte) (s sum) {
	h := sha256.New()
	if c.key != nil {
		h = hmac.New(sha256.New, c.key)
	}
	h.Write(previous[:])
	h.Write(body)
	h.Sum(s[:0])
	return s
}

const (
	beforeHash = `,"hash":"`
	afterHash  = `"}`
	lineStart  = `{"seq":`
)

// line puts a body and its hash together.
func line(body []byte, s sum) []byte {
	out := make([]byte, 0, len(body)+len(beforeHash)+2*len(s)+len(afterHash)+1)
	out = append(append(append(out, body...), beforeHash...), s.String()...)
	return append(append(out, afterHash...), '\n')
}

// parsedRecord is a line of a log as it is read.
type parsedRecord struct {
	entry
	body []byte // shares the line's memory
	hash sum
}

var errNoRecord = errors.New("not a record of an audit log")

// parse reads a line without its line break. It checks the form and no hash.
func parse(text []byte) (w parsedRecord, err error) {
	end := len(text) - len(afterHash) - 2*len(w.hash)
	start := end - len(beforeHash)
	if start < len(lineStart) || len(text) > maxLine || string(text[:len(lineStart)]) != lineStart || string(text[start:end]) != beforeHash ||
		string(text[len(text)-len(afterHash):]) != afterHash {
		return w, errNoRecord
	}
	var ok bool
	if w.hash, ok = parseSum(string(text[end : len(text)-len(afterHash)])); !ok {
		return w, errNoRecord
	}
	if json.Unmarshal(text, &w.entry) != nil || w.Seq == 0 {
		return w, errNoRecord
	}
	w.body = text[:start]
	return w, nil
}

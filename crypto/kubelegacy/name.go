package kubelegacy

import (
	"bytes"
	"crypto/aes"
	"strconv"
	"unicode/utf8"

	"golang.org/x/crypto/nacl/secretbox"
)

// maxKeyName is the maximum length of a key name in bytes, as in a key file.
const maxKeyName = 1024

// KeyName returns the type of the provider that encrypted stored and the name of the key; ok is
// false for a value of another format. It does not decrypt.
//
// The name of a key may contain colons, and nothing in a value says where it ends. Therefore the
// longest matching name among known, the names of the configured keys, has precedence. Otherwise
// KeyName returns the longest name that is printable text and leaves a payload of a valid length.
// That is exact for aescbc, whose payloads are whole blocks. For aesgcm and secretbox one value in
// 400 has a payload whose first bytes look like more of the name.
func KeyName(stored []byte, known []string) (t Type, name string, ok bool) {
	for _, t := range []Type{AESCBC, AESGCM, Secretbox} {
		rest, ok := bytes.CutPrefix(stored, []byte(t.marker()))
		if !ok {
			continue
		}
		longest := ""
		for _, k := range known {
			if len(k) > len(longest) && len(rest) > len(k) && rest[len(k)] == ':' && string(rest[:len(k)]) == k {
				longest = k
			}
		}
		if longest != "" {
			return t, longest, true
		}
		end := t.nameEnd(rest)
		return t, string(rest[:max(end, 0)]), end > 0
	}
	return "", "", false
}

func (t Type) marker() string { return "k8s:enc:" + string(t) + ":v1:" }

// nameEnd returns the length of the name at the beginning of rest, which follows the marker. It is
// the longest possible name, or the part before the first colon if no payload has a valid length;
// -1 if there is no colon.
func (t Type) nameEnd(rest []byte) int {
	end := bytes.IndexByte(rest, ':')
	start := 0 // of the part of the name since its last colon
	for i := 0; i < min(len(rest), maxKeyName+1); {
		r, size := utf8.DecodeRune(rest[i:])
		if r == utf8.RuneError && size == 1 || !strconv.IsPrint(r) {
			break
		}
		if r == ':' {
			if i > start && t.payload(len(rest)-i-1) {
				end = i
			}
			start = i + 1
		}
		i += size
	}
	return end
}

// payload reports whether the provider writes payloads of n bytes.
func (t Type) payload(n int) bool {
	const gcmNonce, gcmTag, secretboxNonce = 12, 16, 24
	switch t {
	case AESCBC:
		return n >= 2*aes.BlockSize && n%aes.BlockSize == 0
	case AESGCM:
		return n >= gcmNonce+gcmTag
	default:
		return n >= secretboxNonce+secretbox.Overhead
	}
}

// Names returns the names of the reader's keys, in order.
func (r *Reader) Names() []string {
	names := make([]string, len(r.keys))
	for i, k := range r.keys {
		names[i] = string(k.prefix[:len(k.prefix)-1])
	}
	return names
}

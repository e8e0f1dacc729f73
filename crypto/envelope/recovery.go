package envelope

import (
	"bytes"
	"maps"
	"strings"
	"unicode/utf8"
)

const (
	// recoverySuffix ends the annotations that hold recovery copies.
	recoverySuffix = ".recovery.etcd-kms-proxy.io"
	// recipientsSuffix ends the annotations that name the recipients of a recovery copy that is an
	// age file.
	recipientsSuffix = ".recovery-id.etcd-kms-proxy.io"
	// ageMagic is the first line of an age file, see https://age-encryption.org/v1. No encoding
	// that [Copy.Append] makes begins with it.
	ageMagic = "age-encryption.org/v1\n"
)

// RecoveryAnnotation returns the annotation in which a value holds the copy of its seed that a
// provider wrapped. The name must do as a part of a domain name: lower-case letters, digits and
// hyphens, in labels between dots. The error wraps [ErrMalformed].
func RecoveryAnnotation(provider string) (string, error) {
	name := provider + recoverySuffix
	if strings.HasSuffix(provider, ".") || !IsAnnotationKey(name) {
		return "", malformed("provider %q cannot be in the name of an annotation: only lower-case letters, digits, - and . can", provider)
	}
	return name, nil
}

// RecoveryProvider returns the provider of a recovery copy by the annotation's name. ok is false
// for any other annotation.
func RecoveryProvider(annotation string) (provider string, ok bool) {
	provider, ok = strings.CutSuffix(annotation, recoverySuffix)
	return provider, ok && provider != ""
}

// IsReserved reports whether an annotation belongs to the proxy and not to the KMS of the value: it
// holds a recovery copy, or names the recipients of one.
func IsReserved(annotation string) bool {
	return strings.HasSuffix(annotation, recoverySuffix) || strings.HasSuffix(annotation, recipientsSuffix)
}

// OfflineCopy is the seed of a value once more, encrypted with public keys whose private keys are
// offline. It is an age file, and the value of the annotation is that file and nothing else, so
// that any implementation of age decrypts it.
type OfflineCopy struct {
	Recipients string // identifies the public keys; "" if the value does not say
	File       []byte
}

// SetOfflineCopy adds the copy of a provider's recipients to the annotations, which must not be
// shared.
func (h *Header) SetOfflineCopy(provider string, c OfflineCopy) {
	if h.Annotations == nil {
		h.Annotations = make(map[string][]byte, 2)
	}
	h.Annotations[provider+recoverySuffix] = c.File
	h.Annotations[provider+recipientsSuffix] = []byte(c.Recipients)
}

// OfflineCopyBy returns the copy of a provider's recipients. It shares the memory of the header. ok
// is false if there is none, also if another KMS wrapped the provider's copy.
func (h *Header) OfflineCopyBy(provider string) (c OfflineCopy, ok bool) {
	file := h.Annotations[provider+recoverySuffix]
	if !bytes.HasPrefix(file, []byte(ageMagic)) {
		return OfflineCopy{}, false
	}
	id := h.Annotations[provider+recipientsSuffix]
	if len(id) > MaxKeyID || !utf8.Valid(id) {
		id = nil
	}
	return OfflineCopy{Recipients: string(id), File: file}, true
}

// Copy is the seed of a value once more, as another KMS wrapped it: a recovery copy. In an
// annotation it is an EncryptedObject that has nothing but the fields of the wrapped seed:
//
//	2 keyID               string             1..1024 bytes
//	3 encryptedDEKSource  bytes              1..1024 bytes
//	4 annotations         map<string,bytes>  as in a value; none of them is a recovery copy
type Copy struct {
	KeyID       string
	Source      []byte
	Annotations map[string][]byte // nil when there are none
}

// Header returns what unwraps the copy. typ is that of the value: a copy is of the same secret. The
// result shares the copy's memory.
func (c *Copy) Header(typ Type) Header {
	return Header{Type: typ, KeyID: c.KeyID, Source: c.Source, Annotations: c.Annotations}
}

// Validate checks the limits of the format. The error wraps [ErrMalformed].
func (c *Copy) Validate() error {
	for k := range c.Annotations {
		if IsReserved(k) {
			return malformed("a recovery copy holds another one")
		}
	}
	h := c.Header(TypeKey)
	return h.Validate()
}

// Append appends the copy's encoding to b. Equal copies have equal encodings. The error wraps
// [ErrMalformed]; b is returned unchanged with it.
func (c *Copy) Append(b []byte) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return b, err
	}
	h := c.Header(TypeKey) // whose number is 0, which is not written
	return h.appendHeader(b), nil
}

// ParseCopy decodes and checks the value of a recovery copy's annotation. Source and the values of
// Annotations alias b. Unknown fields are skipped. The error wraps [ErrMalformed].
func ParseCopy(b []byte) (Copy, error) {
	o, err := parse(b)
	if err != nil {
		return Copy{}, err
	}
	if o.Data != nil || o.Type != TypeKey {
		return Copy{}, malformed("a recovery copy has data or a type of its own")
	}
	c := Copy{KeyID: o.KeyID, Source: o.Source, Annotations: o.Annotations}
	if err := c.Validate(); err != nil {
		return Copy{}, err
	}
	return c, nil
}

// KMSAnnotations returns the annotations that the KMS of the value itself gave: those that are not
// reserved. It returns h.Annotations itself where there are no others; nothing is copied but the
// map.
func (h *Header) KMSAnnotations() map[string][]byte {
	if !h.HasCopies() {
		return h.Annotations
	}
	own := maps.Clone(h.Annotations)
	maps.DeleteFunc(own, func(k string, _ []byte) bool { return IsReserved(k) })
	if len(own) == 0 {
		return nil
	}
	return own
}

// HasCopies reports whether there are reserved annotations, those of recovery copies.
func (h *Header) HasCopies() bool {
	for k := range h.Annotations {
		if IsReserved(k) {
			return true
		}
	}
	return false
}

package envelope

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Limits of the fields, in bytes. kube-apiserver has the same.
const (
	MaxKeyID       = 1024
	MaxSource      = 1024
	MaxAnnotations = 32 * 1024 // all keys and values together
)

// ErrMalformed is wrapped by every error about bytes, or a header, that are not of this format.
var ErrMalformed = errors.New("malformed encrypted object")

// Type is the type of a value's wrapped source, and therefore how its data is encrypted.
type Type int32

// The types, with their values in the stored format.
const (
	TypeKey  Type = 0 // an AES key used directly; read only
	TypeSeed Type = 1 // a seed from which each value's own AES-256 key is derived
)

// Header is all of a value but its data: what it says about its seed. All values encrypted with one
// seed share it.
type Header struct {
	Type        Type
	KeyID       string            // the KMS key that wrapped the seed, 1..1024 bytes of UTF-8
	Source      []byte            // the wrapped seed, 1..1024 bytes
	Annotations map[string][]byte // passed to the KMS unchanged; nil if there are none
}

// Object is a decoded EncryptedObject.
type Object struct {
	Header
	Data []byte // encryptedData, never empty
}

// The field numbers of EncryptedObject.
const (
	fieldData = iota + 1
	fieldKeyID
	fieldSource
	fieldAnnotations
	fieldType
)

// Parse decodes and checks an EncryptedObject: the bytes after the marker. Data, Source and the
// values of Annotations alias b. The error wraps [ErrMalformed].
//
// The last occurrence of a repeated field counts, a field with another wire type is an unknown
// field, and unknown fields are skipped. These are protobuf's rules, so that Parse reads what
// kube-apiserver reads. An attacker gains nothing by adding a second field: the result must still
// decrypt under the etcd key.
func Parse(b []byte) (Object, error) {
	o, err := parse(b)
	if err != nil {
		return Object{}, err
	}
	if len(o.Data) == 0 {
		return Object{}, malformed("encrypted data is empty")
	}
	if err := o.Validate(); err != nil {
		return Object{}, err
	}
	return o, nil
}

// parse decodes without checking the values of the fields.
func parse(b []byte) (Object, error) {
	var o Object
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return Object{}, wireError(n)
		}
		b = b[n:]
		switch {
		case num == fieldData && typ == protowire.BytesType:
			o.Data, n = protowire.ConsumeBytes(b)
		case num == fieldKeyID && typ == protowire.BytesType:
			var v []byte
			if v, n = protowire.ConsumeBytes(b); n >= 0 {
				if !utf8.Valid(v) {
					return Object{}, malformed("key ID is not UTF-8")
				}
				o.KeyID = string(v)
			}
		case num == fieldSource && typ == protowire.BytesType:
			o.Source, n = protowire.ConsumeBytes(b)
		case num == fieldAnnotations && typ == protowire.BytesType:
			var v []byte
			if v, n = protowire.ConsumeBytes(b); n >= 0 {
				key, value, err := parseAnnotation(v)
				if err != nil {
					return Object{}, err
				}
				if o.Annotations == nil {
					o.Annotations = make(map[string][]byte, 1)
				}
				o.Annotations[key] = value
			}
		case num == fieldType && typ == protowire.VarintType:
			var v uint64
			v, n = protowire.ConsumeVarint(b)
			o.Type = Type(int32(v)) //nolint:gosec // protobuf truncates an enum to 32 bits
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return Object{}, wireError(n)
		}
		b = b[n:]
	}
	return o, nil
}

func parseAnnotation(b []byte) (key string, value []byte, err error) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return "", nil, wireError(n)
		}
		b = b[n:]
		switch {
		case num == 1 && typ == protowire.BytesType:
			var v []byte
			if v, n = protowire.ConsumeBytes(b); n >= 0 {
				if !utf8.Valid(v) {
					return "", nil, malformed("annotation key is not UTF-8")
				}
				key = string(v)
			}
		case num == 2 && typ == protowire.BytesType:
			value, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return "", nil, wireError(n)
		}
		b = b[n:]
	}
	return key, value, nil
}

// Cut splits an object without decoding it. If encryptedData is its first field, as in the values
// of every known writer, data is that field's value and rest is all bytes after the field; both
// alias object. ok is false otherwise. Cut checks nothing else: compare rest with one that [Parse]
// has accepted, or call Parse.
func Cut(object []byte) (data, rest []byte, ok bool) {
	if len(object) == 0 || object[0] != fieldData<<3|byte(protowire.BytesType) {
		return nil, nil, false
	}
	data, n := protowire.ConsumeBytes(object[1:])
	if n < 0 || len(data) == 0 {
		return nil, nil, false
	}
	return data, object[1+n:], true
}

// Validate checks the limits of the format. The error wraps [ErrMalformed].
func (h *Header) Validate() error {
	if h.Type != TypeKey && h.Type != TypeSeed {
		return malformed("source type %d is unknown", h.Type)
	}
	switch n := len(h.KeyID); {
	case n == 0:
		return malformed("key ID is empty")
	case n > MaxKeyID:
		return malformed("key ID has %d bytes, more than %d", n, MaxKeyID)
	case !utf8.ValidString(h.KeyID):
		return malformed("key ID is not UTF-8")
	}
	switch n := len(h.Source); {
	case n == 0:
		return malformed("wrapped seed is empty")
	case n > MaxSource:
		return malformed("wrapped seed has %d bytes, more than %d", n, MaxSource)
	}
	total := 0
	for k, v := range h.Annotations {
		if !IsAnnotationKey(k) {
			return malformed("an annotation key is not a fully qualified domain name")
		}
		total += len(k) + len(v)
	}
	if total > MaxAnnotations {
		return malformed("annotations have %d bytes, more than %d", total, MaxAnnotations)
	}
	return nil
}

// Append appends the object's encoding to b. Fields are in order of number, annotations in order of
// key, so equal objects have equal encodings. The error wraps [ErrMalformed]; b is returned
// unchanged with it.
func (o *Object) Append(b []byte) ([]byte, error) {
	if len(o.Data) == 0 {
		return b, malformed("encrypted data is empty")
	}
	if err := o.Validate(); err != nil {
		return b, err
	}
	b = protowire.AppendTag(b, fieldData, protowire.BytesType)
	b = protowire.AppendBytes(b, o.Data)
	return o.appendHeader(b), nil
}

// appendHeader appends every field after encryptedData.
func (h *Header) appendHeader(b []byte) []byte {
	b = protowire.AppendTag(b, fieldKeyID, protowire.BytesType)
	b = protowire.AppendString(b, h.KeyID)
	b = protowire.AppendTag(b, fieldSource, protowire.BytesType)
	b = protowire.AppendBytes(b, h.Source)
	for _, k := range slices.Sorted(maps.Keys(h.Annotations)) {
		v := h.Annotations[k]
		b = protowire.AppendTag(b, fieldAnnotations, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(protowire.SizeTag(1)+protowire.SizeBytes(len(k))+protowire.SizeTag(2)+protowire.SizeBytes(len(v)))) //nolint:gosec // sizes are positive
		b = protowire.AppendTag(b, 1, protowire.BytesType)
		b = protowire.AppendString(b, k)
		b = protowire.AppendTag(b, 2, protowire.BytesType)
		b = protowire.AppendBytes(b, v)
	}
	if h.Type != TypeKey {
		b = protowire.AppendTag(b, fieldType, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(h.Type)) //nolint:gosec // a validated type is 0 or 1
	}
	return b
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrMalformed}, args...)...)
}

func wireError(n int) error {
	return fmt.Errorf("%w: %w", ErrMalformed, protowire.ParseError(n))
}

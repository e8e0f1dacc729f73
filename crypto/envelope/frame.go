package envelope

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"
)

// Frame is a seed to encrypt with, and the bytes before and after the data of every value encrypted
// with it. It is safe for concurrent use.
type Frame struct {
	seed *Seed
	head []byte // marker and the tag of encryptedData
	tail []byte // every field after encryptedData
}

// NewFrame makes a Frame for a provider from the header with the response of the KMS, and the seed.
// h must be a TypeSeed; it is not retained.
func NewFrame(provider string, h Header, seed *Seed) (*Frame, error) {
	marker, err := Marker(provider)
	if err != nil {
		return nil, err
	}
	if err := h.Validate(); err != nil {
		return nil, err
	}
	if h.Type != TypeSeed || seed.typ != TypeSeed {
		return nil, malformed("source type %d is read only", h.Type)
	}
	return &Frame{
		seed: seed,
		head: protowire.AppendTag([]byte(marker), fieldData, protowire.BytesType),
		tail: bytes.Clone(h.appendHeader(nil)),
	}, nil
}

// Rest returns the bytes after encryptedData, as [Cut] returns them for every value of this frame.
// The caller must not change them.
func (f *Frame) Rest() []byte { return f.tail }

// Size returns the size of the result of Seal for a plaintext of n bytes.
func (f *Frame) Size(n int) int {
	return len(f.head) + protowire.SizeBytes(n+Overhead) + len(f.tail)
}

// Seal appends the stored value for plaintext under etcdKey to dst, which must not overlap
// plaintext. It retains no argument. If dst has no room, the result has exactly its size.
func (f *Frame) Seal(dst, etcdKey, plaintext []byte) ([]byte, error) {
	out := dst
	if size := f.Size(len(plaintext)); cap(dst)-len(dst) < size {
		out = append(make([]byte, 0, len(dst)+size), dst...)
	}
	out = append(out, f.head...)
	out = protowire.AppendVarint(out, uint64(len(plaintext)+Overhead))
	out, err := f.seed.seal(out, etcdKey, plaintext)
	if err != nil {
		return nil, err
	}
	return append(out, f.tail...), nil
}

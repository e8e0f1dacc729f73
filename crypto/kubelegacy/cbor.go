package kubelegacy

import (
	"bytes"
	"encoding/binary"
	"math"
	"unicode/utf8"
)

// Major types of CBOR (RFC 8949).
const (
	cborUnsigned = iota
	cborNegative
	cborBytes
	cborText
	cborArray
	cborMap
	cborTag
	cborSimple
)

// maxCBORDepth is the maximum nesting depth of values, the limit of Kubernetes.
const maxCBORDepth = 64

// cborReader reads CBOR in the core deterministic encoding: lengths are definite and have the
// shortest encoding, and the names of a map are sorted and unique.
type cborReader struct{ rest []byte }

// parseCBOR parses an object in CBOR, without its self-description tag.
func parseCBOR(b []byte) (o object, ok bool) {
	r := &cborReader{rest: b}
	top, ok := r.members(0)
	if !ok || len(r.rest) > 0 {
		return o, false
	}
	apiVersion, okVersion := cborString(top["apiVersion"])
	kind, okKind := cborString(top["kind"])
	if !okVersion || !okKind || !isType(apiVersion, kind) {
		return o, false
	}
	meta, ok := (&cborReader{rest: top["metadata"]}).members(1)
	if !ok {
		return o, false
	}
	for name, into := range map[string]*string{"name": &o.name, "namespace": &o.namespace} {
		if v, there := meta[name]; there {
			if *into, ok = cborString(v); !ok {
				return object{}, false
			}
		}
	}
	return o, true
}

// cborString returns a value that is a string, which Kubernetes writes as bytes.
func cborString(value []byte) (string, bool) {
	r := &cborReader{rest: value}
	major, n, ok := r.head()
	if !ok || major != cborBytes && major != cborText || n != uint64(len(r.rest)) || !utf8.Valid(r.rest) {
		return "", false
	}
	return string(r.rest), true
}

// head reads the head of a value: its type, and its number, length or argument.
func (r *cborReader) head() (major int, argument uint64, ok bool) {
	if len(r.rest) == 0 {
		return 0, 0, false
	}
	first := r.rest[0]
	major, argument = int(first>>5), uint64(first&0x1f)
	r.rest = r.rest[1:]
	if argument < 24 {
		// false, true, null
		return major, argument, major != cborSimple || argument >= 20 && argument <= 22
	}
	size := 1 << (argument - 24)
	if argument > 27 || len(r.rest) < size {
		return 0, 0, false
	}
	var wide [8]byte
	copy(wide[8-size:], r.rest)
	r.rest = r.rest[size:]
	argument = binary.BigEndian.Uint64(wide[:])
	least := [...]uint64{1: 24, 2: 1 << 8, 4: 1 << 16, 8: 1 << 32}[size]
	// The argument of a simple value is a float, whose shortest form is not checked, or one of the
	// values from 32 on, which nothing writes.
	if major == cborSimple {
		return major, argument, size > 1
	}
	return major, argument, argument >= least
}

// take takes n bytes.
func (r *cborReader) take(n uint64) (b []byte, ok bool) {
	if n > uint64(len(r.rest)) {
		return nil, false
	}
	b, r.rest = r.rest[:n], r.rest[n:]
	return b, true
}

// value reads one value, and returns its bytes.
func (r *cborReader) value(depth int) (whole []byte, ok bool) {
	begin := r.rest
	if !r.skip(depth) {
		return nil, false
	}
	return begin[:len(begin)-len(r.rest)], true
}

// skip reads one value.
func (r *cborReader) skip(depth int) bool {
	if depth > maxCBORDepth {
		return false
	}
	if len(r.rest) > 0 && r.rest[0]>>5 == cborMap {
		_, ok := r.members(depth)
		return ok
	}
	major, n, ok := r.head()
	if !ok {
		return false
	}
	switch major {
	case cborBytes:
		_, ok = r.take(n)
	case cborText:
		var text []byte
		text, ok = r.take(n)
		ok = ok && utf8.Valid(text)
	case cborArray:
		for ; ok && n > 0; n-- {
			ok = r.skip(depth + 1)
		}
	case cborTag:
		ok = r.skip(depth + 1)
	}
	return ok
}

// members reads a map whose names are strings.
func (r *cborReader) members(depth int) (all map[string][]byte, ok bool) {
	major, n, ok := r.head()
	if !ok || major != cborMap || n > uint64(min(len(r.rest), math.MaxInt32)) {
		return nil, false
	}
	all = make(map[string][]byte)
	var last []byte
	for range n {
		name, ok := r.value(depth + 1)
		if !ok || bytes.Compare(last, name) >= 0 {
			return nil, false
		}
		text, ok := cborString(name)
		if !ok {
			return nil, false
		}
		value, ok := r.value(depth + 1)
		if !ok {
			return nil, false
		}
		last, all[text] = name, value
	}
	return all, true
}

package kubelegacy

import (
	"bytes"
	"encoding/json"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// object is the name and namespace of an object that kube-apiserver serialized, "" if it has none.
type object struct{ namespace, name string }

// parseObject parses all of a serialized object as kube-apiserver stores it, in protobuf, JSON or
// CBOR (k8s.io/apimachinery, pkg/runtime/serializer). ok is false for anything else, and for any
// bytes before, between or after its parts: it is the only check that distinguishes a value of
// aescbc from noise.
//
//	protobuf  "k8s\0" | runtime.Unknown{1: TypeMeta{1: apiVersion, 2: kind}, 2: the object{1: ObjectMeta, …}, 3: "", 4: ""}
//	JSON      {"apiVersion": …, "kind": …, "metadata": {…}, …} and a line feed
//	CBOR      0xd9d9f7 | the same, in the core deterministic encoding of RFC 8949
func parseObject(b []byte) (o object, ok bool) {
	switch {
	case bytes.HasPrefix(b, []byte(protobufMark)):
		return parseProtobuf(b[len(protobufMark):])
	case bytes.HasPrefix(b, []byte(cborMark)):
		return parseCBOR(b[len(cborMark):])
	default:
		return parseJSON(b)
	}
}

const (
	protobufMark = "k8s\x00"
	cborMark     = "\xd9\xd9\xf7"
)

// fits reports whether an object may be stored under an etcd key, which ends with the object's
// namespace and name. An object without a name, such as a range of addresses, fits any.
func (o *object) fits(etcdKey []byte) bool {
	end := "/" + o.name
	if o.namespace != "" {
		end = "/" + o.namespace + end
	}
	return o.name == "" || strings.HasSuffix(string(etcdKey), end)
}

// isType reports whether an API version and a kind are well-formed: "v1" or "apps/v1", and
// "Secret".
func isType(apiVersion, kind string) bool {
	group, version, grouped := strings.Cut(apiVersion, "/")
	if !grouped {
		group, version = "g", apiVersion
	}
	return isWord(group, ".-") && isWord(version, "") && isWord(kind, "-")
}

// isWord reports whether s is letters, digits and some other characters of ASCII, and not too long.
func isWord(s, others string) bool {
	return s != "" && len(s) <= 253 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(others, r)
	})
}

// field is one field of a protobuf message.
type field struct {
	number protowire.Number
	typ    protowire.Type
	data   []byte // of protowire.BytesType
}

// fields reads a message as kube-apiserver's generated code writes it: fields in the order of their
// numbers, each tag and length in as few bytes as can be, no groups.
func fields(b []byte) (all []field, ok bool) {
	for last := protowire.Number(0); len(b) > 0; {
		number, typ, n := protowire.ConsumeTag(b)
		if n != protowire.SizeTag(number) || number < last {
			return nil, false
		}
		f := field{number: number, typ: typ}
		b, last = b[n:], number
		switch typ {
		case protowire.BytesType:
			f.data, n = protowire.ConsumeBytes(b)
			if n != protowire.SizeBytes(len(f.data)) {
				return nil, false
			}
		case protowire.VarintType:
			var v uint64
			if v, n = protowire.ConsumeVarint(b); n != protowire.SizeVarint(v) {
				return nil, false
			}
		case protowire.Fixed32Type, protowire.Fixed64Type:
			if n = protowire.ConsumeFieldValue(number, typ, b); n < 0 {
				return nil, false
			}
		default:
			return nil, false
		}
		b = b[n:]
		all = append(all, f)
	}
	return all, true
}

// isExactly reports whether fields are those of the numbers 1 to n, each once, with bytes.
func isExactly(n int, all []field) bool {
	if len(all) != n {
		return false
	}
	for i, f := range all {
		if int(f.number) != i+1 || f.typ != protowire.BytesType {
			return false
		}
	}
	return true
}

// parseProtobuf reads a runtime.Unknown. Its last two fields are always present and empty, and so
// mark the end of the object.
func parseProtobuf(b []byte) (o object, ok bool) {
	unknown, ok := fields(b)
	if !ok || !isExactly(4, unknown) || len(unknown[2].data)+len(unknown[3].data) > 0 {
		return o, false
	}
	typeMeta, ok := fields(unknown[0].data)
	if !ok || !isExactly(2, typeMeta) || !isType(string(typeMeta[0].data), string(typeMeta[1].data)) {
		return o, false
	}
	raw, ok := fields(unknown[1].data)
	if !ok || len(raw) == 0 || raw[0].number != 1 || raw[0].typ != protowire.BytesType || len(raw) > 1 && raw[1].number == 1 {
		return o, false
	}
	return parseObjectMeta(raw[0].data)
}

// Fields of ObjectMeta.
const (
	metaName      = 1
	metaNamespace = 3
	metaLast      = 17 // of the supported versions
)

// metaFields are the types of ObjectMeta's fields, and which of them may be repeated.
var metaFields = map[protowire.Number]struct {
	typ            protowire.Type
	text, repeated bool
}{
	metaName: {protowire.BytesType, true, false}, 2: {protowire.BytesType, true, false}, metaNamespace: {protowire.BytesType, true, false},
	4: {protowire.BytesType, true, false}, 5: {protowire.BytesType, true, false}, 6: {protowire.BytesType, true, false}, 7: {protowire.VarintType, false, false},
	8: {protowire.BytesType, false, false}, 9: {protowire.BytesType, false, false}, 10: {protowire.VarintType, false, false},
	11: {protowire.BytesType, false, true}, 12: {protowire.BytesType, false, true}, 13: {protowire.BytesType, false, true}, 14: {protowire.BytesType, true, true},
	15: {protowire.BytesType, true, false}, 16: {protowire.BytesType, false, false}, metaLast: {protowire.BytesType, false, true},
}

func parseObjectMeta(b []byte) (o object, ok bool) {
	all, ok := fields(b)
	if !ok {
		return o, false
	}
	for i, f := range all {
		want, known := metaFields[f.number]
		switch {
		case !known && f.number > metaLast: // of a later Kubernetes
			continue
		case !known, f.typ != want.typ, want.text && !utf8.Valid(f.data), !want.repeated && i > 0 && all[i-1].number == f.number:
			return object{}, false
		}
		switch f.number {
		case metaName:
			o.name = string(f.data)
		case metaNamespace:
			o.namespace = string(f.data)
		}
	}
	return o, true
}

// parseJSON parses an object in JSON, and at most one line feed after it.
func parseJSON(b []byte) (o object, ok bool) {
	b = bytes.TrimSuffix(b, []byte{'\n'})
	if len(b) < 2 || b[0] != '{' || b[len(b)-1] != '}' || !utf8.Valid(b) {
		return o, false
	}
	top, ok := members(b)
	if !ok {
		return o, false
	}
	var apiVersion, kind string
	if json.Unmarshal(top["apiVersion"], &apiVersion) != nil || json.Unmarshal(top["kind"], &kind) != nil || !isType(apiVersion, kind) {
		return o, false
	}
	meta, ok := members(top["metadata"])
	if !ok {
		return o, false
	}
	for name, into := range map[string]*string{"name": &o.name, "namespace": &o.namespace} {
		if v, there := meta[name]; there && json.Unmarshal(v, into) != nil {
			return object{}, false
		}
	}
	return o, true
}

// members parses a JSON object. A duplicate name is refused.
func members(b []byte) (all map[string]json.RawMessage, ok bool) {
	d := json.NewDecoder(bytes.NewReader(b))
	if begin, err := d.Token(); err != nil || begin != json.Delim('{') {
		return nil, false
	}
	all = make(map[string]json.RawMessage)
	for d.More() {
		name, err := d.Token()
		text, isText := name.(string)
		var value json.RawMessage
		if err != nil || !isText || d.Decode(&value) != nil {
			return nil, false
		}
		if _, twice := all[text]; twice {
			return nil, false
		}
		all[text] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, false
	}
	return all, d.InputOffset() == int64(len(b))
}

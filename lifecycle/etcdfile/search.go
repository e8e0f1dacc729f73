package etcdfile

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// Files are searched in windows. A match begins within a window and may end in the overlap after
// it. The tag and the length of its key are in the bytes before it, and the marker of an encrypted
// value before these.
const (
	window  = 8 << 20
	overlap = 4 << 20
	before  = maxMarker + 1 + maxKeyLength
	// maxKeyLength is the maximum size of the length of a key.
	maxKeyLength = 3
	// minValueBytes is the minimum size of the beginning of a value that can be judged.
	minValueBytes = 4
	// maxMarker is the maximum size of the marker of an encrypted value.
	maxMarker = 512
)

// scheme is the beginning of the marker of an encrypted value, which the name of its provider and a
// colon end.
var scheme = []byte("k8s:enc:kms:v2:")

// magic is the prefix of Kubernetes objects in protobuf.
var magic = []byte("k8s\x00")

// search searches the content of r, which has size bytes, or an unknown number if size is negative.
// It skips the decoded spans and needs memory for one window. The error is that of r or of ctx.
func (l *inspection) search(ctx context.Context, r io.Reader, size int64, decoded spans) error {
	canaries := canaryForms(l.Canaries)
	length := int64(before + window + overlap)
	if size >= 0 {
		length = min(length, size+1) // one more, to detect the end
	}
	buffer, filled := make([]byte, length), 0
	at, from := int64(0), 0 // the offset of buffer[0], and where the window begins in buffer
	var failure error       // of r; the bytes before it are searched nevertheless
	for ended := false; ; {
		for filled < len(buffer) && !ended {
			if err := ctx.Err(); err != nil {
				return err
			}
			n, err := r.Read(buffer[filled:])
			filled += n
			if err != nil {
				ended = true
				if !errors.Is(err, io.EOF) {
					failure = err
				}
			}
		}
		w := windowed{b: buffer[:filled], from: from}
		for _, p := range l.Prefixes {
			if p != "" {
				w.each([]byte(p), func(i int) { l.remains(w.b, i, at, decoded) })
			}
		}
		if len(l.Kinds) > 0 {
			w.each(magic, func(i int) { l.object(w.b[i:], at+int64(i)) })
		}
		for _, c := range canaries {
			w.each(c, func(i int) { l.found(Finding{Place: Canary, Offset: at + int64(i), Why: "found the canary string"}) })
		}
		if from+window >= filled { // only at the end
			return failure
		}
		drop := max(0, from+window-before)
		filled = copy(buffer, buffer[drop:filled])
		at, from = at+int64(drop), from+window-drop
	}
}

// windowed holds the bytes of a window, from b[from] on, with those before it and the overlap.
type windowed struct {
	b    []byte
	from int
}

// each calls visit with the index of each match of what that begins within the window.
func (w windowed) each(what []byte, visit func(i int)) {
	for from := w.from; from < len(w.b); {
		i := bytes.Index(w.b[from:], what)
		if i < 0 || from+i >= w.from+window {
			return
		}
		visit(from + i)
		from += i + 1
	}
}

// canaryForms returns the byte strings to search for: each canary itself, and its base64 encodings
// after zero, one and two other bytes.
func canaryForms(canaries [][]byte) [][]byte {
	var forms [][]byte
	for _, c := range canaries {
		if len(c) == 0 {
			continue
		}
		forms = append(forms, c)
		for shift := range 3 {
			coded := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), c...))
			// The characters at both ends depend on the bytes before and after the canary.
			head, tail := (shift*8+5)/6, len(coded)-(shift+len(c))%3
			if (shift+len(c))%3 != 0 {
				tail = len(coded) - 1
			}
			if tail-head >= 8 { // shorter strings match by chance
				forms = append(forms, []byte(coded[head:tail]))
			}
		}
	}
	return forms
}

// remains judges the value of a key under a rule that begins at b[i], if the bytes around it are a
// KeyValue or a PutRequest.
func (l *inspection) remains(b []byte, i int, at int64, decoded spans) {
	if decoded.contain(at + int64(i)) {
		return
	}
	key, rest, ok := keyAt(b, i)
	if !ok {
		return
	}
	revision, value, complete, ok := valueAfter(rest)
	if !ok || l.reported[identityOf(key, revision)] {
		return
	}
	if why := l.Judge(key, value, complete); why != "" {
		l.found(Finding{Place: Remains, Key: string(key), Revision: revision, Offset: at + int64(i), Why: why})
	}
}

// keyAt returns the key that begins at b[i], according to the tag and the length before it. Both
// messages have the key in field 1.
func keyAt(b []byte, i int) (key, rest []byte, ok bool) {
	for size := 1; size <= maxKeyLength; size++ {
		start := i - size - 1
		if start < 0 || b[start] != 1<<3|byte(protowire.BytesType) {
			continue
		}
		n, used := protowire.ConsumeVarint(b[start+1 : i])
		if used == size && n > 0 && n <= uint64(len(b)-i) && !endsWithMarker(b[:start]) { //nolint:gosec // i is within b
			return b[i : i+int(n)], b[i+int(n):], true //nolint:gosec // not more than len(b)
		}
	}
	return nil, nil, false
}

// endsWithMarker reports whether b ends with the marker of an encrypted value. Field 1 after it is
// ciphertext, which may begin like a short prefix by chance. No key follows a marker: the length of
// its message, or the revision as the key of a database, is in between.
func endsWithMarker(b []byte) bool {
	b, ok := bytes.CutSuffix(b[max(0, len(b)-maxMarker):], []byte{':'})
	i := bytes.LastIndex(b, scheme)
	return ok && i >= 0 && !bytes.Contains(b[i+len(scheme):], []byte{':'})
}

// valueAfter reads the fields after a key up to the value: field 5 of a KeyValue, after the
// revisions 2 and 3 and the version 4, or field 2 of a PutRequest.
func valueAfter(b []byte) (revision int64, value []byte, complete, ok bool) {
	for range 8 {
		n, t, size := protowire.ConsumeTag(b)
		if size < 0 {
			return 0, nil, false, false
		}
		b = b[size:]
		switch {
		case t == protowire.BytesType && (n == 5 || n == 2):
			length, size := protowire.ConsumeVarint(b)
			if size < 0 {
				return 0, nil, false, false
			}
			b = b[size:]
			if length <= uint64(len(b)) {
				return revision, b[:length], true, true
			}
			return revision, b, false, len(b) >= minValueBytes
		case t == protowire.VarintType && n >= 2 && n <= 6:
			v, size := protowire.ConsumeVarint(b)
			if size < 0 {
				return 0, nil, false, false
			}
			if n == 3 {
				revision = int64(v) //nolint:gosec // as protobuf has it
			}
			b = b[size:]
		default:
			return 0, nil, false, false
		}
	}
	return 0, nil, false, false
}

// object reports a Kubernetes object of one of Config.Kinds. The magic is followed by a
// runtime.Unknown, with a TypeMeta of API version and kind.
func (l *inspection) object(b []byte, at int64) {
	b = b[len(magic):]
	n, t, size := protowire.ConsumeTag(b)
	if size < 0 || n != 1 || t != protowire.BytesType {
		return
	}
	meta, used := protowire.ConsumeBytes(b[size:])
	if used < 0 {
		return
	}
	var kind string
	fields(meta, func(n protowire.Number, _ uint64, d []byte) {
		if n == 2 {
			kind = string(d)
		}
	})
	if slices.Contains(l.Kinds, kind) {
		l.found(Finding{Place: Object, Key: kind, Offset: at, Why: "a Kubernetes " + kind + " in plaintext"})
	}
}

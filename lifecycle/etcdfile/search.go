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

// Files are searched in windows. What begins in one may end in the overlap behind it, and has the
// tag and the length of its key in the bytes before it.
const (
	window  = 8 << 20
	overlap = 4 << 20
	before  = 1 + maxKeyLength
	// maxKeyLength is how many bytes the length of a key takes at most.
	maxKeyLength = 3
	// clue is how much of a value's beginning must be left for it to be judged.
	clue = 4
)

// magic begins Kubernetes' objects in protobuf.
var magic = []byte("k8s\x00")

// search searches what r yields, of size bytes or of an unknown number if that is negative.
// Requests that stand in decoded parts were looked at before. It takes memory for one window. The
// error is r's, or of ctx.
func (l *look) search(ctx context.Context, r io.Reader, size int64, decoded spans) error {
	canaries := canaryForms(l.Canaries)
	length := int64(before + window + overlap)
	if size >= 0 {
		length = min(length, size+1) // so that the end is seen
	}
	buffer, filled := make([]byte, length), 0
	at, from := int64(0), 0 // the offset of buffer[0], and where the window begins in buffer
	var failure error       // of r; what came before it is searched all the same
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
			w.each(c, func(i int) { l.found(Finding{Place: Canary, Offset: at + int64(i), Why: "a canary stands there"}) })
		}
		if from+window >= filled { // only at the end
			return failure
		}
		drop := max(0, from+window-before)
		filled = copy(buffer, buffer[drop:filled])
		at, from = at+int64(drop), from+window-drop
	}
}

// windowed are the bytes of a window, from b[from] on, with those before and the overlap.
type windowed struct {
	b    []byte
	from int
}

// each calls visit with each place in the window's own part where what begins.
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

// canaryForms returns how canaries may stand in a file: as they are, and in base64 behind none, one
// and two bytes of something else.
func canaryForms(canaries [][]byte) [][]byte {
	var forms [][]byte
	for _, c := range canaries {
		if len(c) == 0 {
			continue
		}
		forms = append(forms, c)
		for shift := range 3 {
			coded := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), c...))
			// The characters at both ends depend on what stands beside it.
			head, tail := (shift*8+5)/6, len(coded)-(shift+len(c))%3
			if (shift+len(c))%3 != 0 {
				tail = len(coded) - 1
			}
			if tail-head >= 8 { // less would be found by chance
				forms = append(forms, []byte(coded[head:tail]))
			}
		}
	}
	return forms
}

// remains looks at a ruled key that begins at b[i]: whether it is one of a KeyValue or a
// PutRequest, and its value one that should not be readable.
func (l *look) remains(b []byte, i int, at int64, decoded spans) {
	if decoded.hold(at + int64(i)) {
		return
	}
	key, rest, ok := keyAt(b, i)
	if !ok {
		return
	}
	revision, value, whole, ok := valueBehind(rest)
	if !ok || l.known[identity(key, revision)] {
		return
	}
	if why := l.Judge(key, value, whole); why != "" {
		l.found(Finding{Place: Remains, Key: string(key), Revision: revision, Offset: at + int64(i), Why: why})
	}
}

// keyAt returns the key that begins at b[i], by the tag and the length before it. Both messages
// have it in field 1.
func keyAt(b []byte, i int) (key, rest []byte, ok bool) {
	for size := 1; size <= maxKeyLength; size++ {
		start := i - size - 1
		if start < 0 || b[start] != 1<<3|byte(protowire.BytesType) {
			continue
		}
		n, used := protowire.ConsumeVarint(b[start+1 : i])
		if used == size && n > 0 && n <= uint64(len(b)-i) { //nolint:gosec // i is within b
			return b[i : i+int(n)], b[i+int(n):], true //nolint:gosec // not more than len(b)
		}
	}
	return nil, nil, false
}

// valueBehind reads the fields behind a key up to the value: 5 of a KeyValue, after the revisions 2
// and 3 and the version 4, or 2 of a PutRequest.
func valueBehind(b []byte) (revision int64, value []byte, whole, ok bool) {
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
			return revision, b, false, len(b) >= clue
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

// object looks at a Kubernetes object: behind the magic, runtime.Unknown with a TypeMeta of API
// version and kind.
func (l *look) object(b []byte, at int64) {
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
		l.found(Finding{Place: Object, Key: kind, Offset: at, Why: "a " + kind + " of Kubernetes stands there in the clear"})
	}
}

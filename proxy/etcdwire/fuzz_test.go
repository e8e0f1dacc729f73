package etcdwire

import (
	"bytes"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"
)

// check holds one message, however strange, against everything that must be true of a rewriter.
func check(t *testing.T, m method, msg []byte) {
	t.Helper()
	original := bytes.Clone(msg)

	// An edit that changes nothing gives the very same bytes.
	out, err := m.rewrite(msg, new(untouched))
	if err == nil && (!bytes.Equal(out, msg) || !m.answer && !same(out, msg)) {
		t.Fatalf("%s: an identity edit copied the message", m.name)
	}
	if err != nil && !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrByValue) {
		t.Fatalf("%s: unexpected error %v", m.name, err)
	}
	if err == nil && proto.Unmarshal(msg, m.message()) != nil {
		// Only text that is not UTF-8 and groups that nobody sends are judged otherwise; etcd
		// answers those itself.
		return
	}

	// Whatever is accepted decodes to what the model makes of it.
	rules := brackets{"s/"}
	got, err := m.rewrite(msg, rules)
	if !bytes.Equal(msg, original) {
		t.Fatalf("%s: the rewriter wrote into its input", m.name)
	}
	if err != nil {
		return
	}
	want := m.message()
	if err := proto.Unmarshal(msg, want); err != nil {
		return
	}
	if err := m.model(want, rules); err != nil {
		t.Fatalf("%s: the model fails with %v where the rewriter does not", m.name, err)
	}
	if have := decode(t, got, m.message()); !proto.Equal(have, want) {
		t.Fatalf("%s: %x\n got %v\nwant %v", m.name, msg, have, want)
	}
}

// reversed puts the brackets back on where an answer's rewriter takes them off.
type reversed struct{ brackets }

func (r reversed) Open(dst, key, value []byte) ([]byte, error) {
	if !r.covers(key) {
		return append(dst, value...), nil
	}
	return r.Seal(dst, key, value)
}

func FuzzRewrite(f *testing.F) {
	for i, m := range methods {
		for _, sample := range samples()[m.name] {
			f.Add(byte(i), wire(f, sample))
		}
	}
	f.Fuzz(func(t *testing.T, which byte, msg []byte) {
		check(t, methods[int(which)%len(methods)], msg)
	})
}

// FuzzInverse opens an answer and seals it again: the message must come back byte for byte.
func FuzzInverse(f *testing.F) {
	for _, m := range []string{"RangeResponse", "WatchResponse", "TxnResponse", "DeleteRangeResponse", "PutResponse", "RangeStreamResponse"} {
		for _, sample := range samples()[m] {
			f.Add(wire(f, sample))
		}
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		for _, m := range methods {
			if !m.answer {
				continue
			}
			opened, err := m.rewrite(msg, brackets{"s/"})
			if err != nil || bytes.Equal(opened, msg) || !canonical(m, msg) {
				continue
			}
			sealed, err := m.rewrite(opened, reversed{brackets{"s/"}})
			if err != nil {
				t.Fatalf("%s: the inverse fails: %v", m.name, err)
			}
			if !bytes.Equal(sealed, msg) {
				t.Fatalf("%s: edit and inverse differ\n got %x\nwant %x", m.name, sealed, msg)
			}
		}
	})
}

// canonical reports whether msg is as etcd's own encoder writes it. A length prefix with needless
// bytes is not restored.
func canonical(m method, msg []byte) bool {
	v := m.message()
	if proto.Unmarshal(msg, v) != nil {
		return false
	}
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(v)
	return err == nil && bytes.Equal(again, msg)
}

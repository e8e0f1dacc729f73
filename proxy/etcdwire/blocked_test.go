package etcdwire

import (
	"bytes"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"
)

// blocking opens after values, and would have to wait for the next one.
type blocking struct {
	brackets
	after int
}

func (b *blocking) Open(key, stored []byte) ([]byte, error) {
	if !b.covers(key) {
		return stored, nil
	}
	if b.after == 0 {
		return nil, ErrWouldBlock
	}
	b.after--
	return b.brackets.Open(key, stored)
}

// TestResume: a response of which some values were opened before one would have had to wait is
// opened in place to the same end, wherever that was, and however often.
func TestResume(t *testing.T) {
	for _, m := range methods {
		for i, sample := range samples()[m.name] {
			if !m.answer {
				continue
			}
			msg := wire(t, sample)
			want, err := m.rewrite(bytes.Clone(msg), brackets{"s/"})
			if err != nil {
				continue
			}
			for after := range 20 {
				own := bytes.Clone(msg)
				got, err := m.rewrite(own, &blocking{brackets{"s/"}, after})
				if err == nil {
					break
				}
				// one value more each time
				for n := 0; n < 100 && errors.Is(err, ErrWouldBlock); n++ {
					var blocked *Blocked
					if !errors.As(err, &blocked) {
						t.Fatalf("%s: %v", m.name, err)
					}
					got, err = m.rewrite(own, blocked.Resume(&blocking{brackets{"s/"}, 1}))
				}
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s, sample %d, after %d values: %v\n got %v\nwant %v", m.name, i, after, err, decode(t, got, m.message()), proto.Message(decode(t, want, m.message())))
				}
			}
		}
	}
}

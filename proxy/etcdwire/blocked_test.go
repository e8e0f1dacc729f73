package etcdwire

import (
	"bytes"
	"errors"
	"testing"
)

// blocking opens after values, and would have to wait for the next one.
type blocking struct {
	brackets
	after int
}

func (b *blocking) Open(dst, key, stored []byte) ([]byte, error) {
	if b.covers(key) {
		if b.after == 0 {
			return nil, ErrWouldBlock
		}
		b.after--
	}
	return b.brackets.Open(dst, key, stored)
}

// TestWouldBlock: a response of which some values were opened before one would have had to wait is
// as it was, so that it can be opened again.
func TestWouldBlock(t *testing.T) {
	for _, m := range methods {
		for i, sample := range samples()[m.name] {
			if !m.answer {
				continue
			}
			msg := wire(t, sample)
			own := bytes.Clone(msg)
			for after := range 20 {
				_, err := m.rewrite(own, &blocking{brackets{"s/"}, after})
				if err == nil {
					break
				}
				if !errors.Is(err, ErrWouldBlock) || !bytes.Equal(own, msg) {
					t.Fatalf("%s, sample %d, after %d values: %v, unchanged: %v", m.name, i, after, err, bytes.Equal(own, msg))
				}
			}
		}
	}
}

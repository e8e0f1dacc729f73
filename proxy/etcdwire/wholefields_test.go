package etcdwire

import "testing"

func FuzzWholeFields(f *testing.F) {
	f.Add([]byte("\x0a\x03abc\x10\x05"))
	f.Add([]byte("\x0a\xff\xff\xff\xff\x0f"))
	f.Fuzz(func(t *testing.T, b []byte) {
		whole, next := WholeFields(b)
		if whole < 0 || whole > len(b) || next > 0 && whole+next <= len(b) {
			t.Fatalf("%d and %d of %d bytes", whole, next, len(b))
		}
	})
}

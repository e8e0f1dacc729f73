package rpc

import (
	"errors"
	"io"
	"testing"

	"google.golang.org/grpc/mem"
)

// TestWipingPool: a buffer that comes back to the pool holds nothing of what it held, up to its
// whole capacity.
func TestWipingPool(t *testing.T) {
	pool := new(Pool)
	for _, n := range []int{0, 1, 255, 256, 1024, 1025, 2048, 2049, 5000, 1 << 20, 1<<20 + 1} {
		for range 3 {
			b := pool.Get(n)
			if len(*b) != n {
				t.Fatalf("Get(%d) has %d bytes", n, len(*b))
			}
			for i, v := range (*b)[:cap(*b)] {
				if v != 0 {
					t.Fatalf("Get(%d): byte %d of %d is not zero", n, i, cap(*b))
				}
			}
			for i := range *b {
				(*b)[i] = 0xaa
			}
			if n >= minPooled && mem.IsBelowBufferPoolingThreshold(cap(*b)) {
				t.Errorf("Get(%d): grpc would never give back a buffer of %d bytes", n, cap(*b))
			}
			pool.Put(b)
			if n > 0 && (*b)[0] != 0 {
				t.Errorf("Get(%d): not cleared when it came back", n)
			}
		}
	}
}

// TestReplace covers what a rewriter may make of a message: the same, less, nothing, or more.
func TestReplace(t *testing.T) {
	for _, size := range []int{10, 3000} {
		msg := make([]byte, size)
		for i := range msg {
			msg[i] = byte(i)
		}
		for name, edit := range map[string]func(dst, b []byte) []byte{
			"the same": func(dst, b []byte) []byte { return append(dst, b...) },
			"front":    func(dst, b []byte) []byte { return append(dst, b[:size/2]...) },
			"nothing":  func(dst, _ []byte) []byte { return dst },
			"more":     func(dst, b []byte) []byte { return append(append(dst, "more"...), b...) },
		} {
			half := size / 2
			f := &Message{Data: mem.BufferSlice{mem.SliceBuffer(msg[:half]), mem.SliceBuffer(msg[half:])}}
			want := string(edit(nil, msg))
			if err := f.Replace(true, func(dst, b []byte) ([]byte, error) { return edit(dst, b), nil }); err != nil {
				t.Fatal(err)
			}
			if got := string(f.Data.Materialize()); got != want {
				t.Errorf("%s of %d: got %d bytes, want %d", name, size, len(got), len(want))
			}
			if msg[0] != 0 {
				t.Fatalf("%s of %d: grpc's buffer was written to", name, size)
			}
			f.Free()
		}
		f := &Message{Data: mem.BufferSlice{mem.SliceBuffer(msg)}}
		if err := f.Replace(true, func(_, _ []byte) ([]byte, error) { return nil, io.ErrUnexpectedEOF }); !errors.Is(err, io.ErrUnexpectedEOF) || f.Data.Len() != 0 {
			t.Errorf("got %v and %d bytes", err, f.Data.Len())
		}
	}
}

package http2conn

import (
	"io"

	"google.golang.org/grpc/mem"
)

// Sizes of what is read at once, in bytes: a peer that fills the buffer gets a larger one, and one that has grown silent a small one again. Most connections are silent most of
// the time.
const (
	minInput = 4 << 10
	maxInput = 256 << 10
)

// input is a buffered reader. One goroutine uses it.
type input struct {
	read func([]byte) (int, error) // from the connection
	pool mem.BufferPool
	buf  *[]byte
	r, w int // what was read and not taken
}

// Read implements io.Reader.
func (in *input) Read(b []byte) (int, error) {
	have, err := in.next(len(b))
	return copy(b, have), err
}

// next returns up to n bytes, at least one, that are there until the next call.
func (in *input) next(n int) ([]byte, error) {
	if in.r == in.w {
		if err := in.fill(); err != nil {
			return nil, err
		}
	}
	b := (*in.buf)[in.r:min(in.w, in.r+n)]
	in.r += len(b)
	return b, nil
}

// fill reads once, after everything was taken.
func (in *input) fill() error {
	if in.buf == nil {
		in.resize(minInput)
	} else if size := len(*in.buf); in.w == size && size < maxInput {
		in.resize(4 * size)
	} else if in.w < size/16 && size > minInput {
		in.resize(size / 4)
	}
	n, err := in.read(*in.buf)
	in.r, in.w = 0, n
	if n > 0 {
		return nil // an error that came with bytes comes again without
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// resize takes another buffer, while there is nothing in the one that there is.
func (in *input) resize(size int) {
	in.free()
	in.buf = in.pool.Get(size)
}

// free gives the buffer back.
func (in *input) free() {
	if in.buf != nil {
		in.pool.Put(in.buf)
		in.buf = nil
	}
}

package h2

import "google.golang.org/grpc/mem"

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
	if in.r == in.w {
		if in.buf == nil {
			in.resize(minInput)
		}
		n, err := in.read(*in.buf)
		in.r, in.w = 0, n
		if n == 0 {
			return 0, err // an error that came with bytes comes again without
		}
	}
	n := copy(b, (*in.buf)[in.r:in.w])
	if in.r += n; in.r == in.w {
		switch size := len(*in.buf); {
		case in.w == size && size < maxInput:
			in.resize(4 * size)
		case in.w < size/16:
			in.resize(size / 4)
		}
	}
	return n, nil
}

// resize takes another buffer, while there is nothing in the one that there is.
func (in *input) resize(size int) {
	in.free()
	in.buf = in.pool.Get(max(size, minInput))
	in.r, in.w = 0, 0
}

// free gives the buffer back.
func (in *input) free() {
	if in.buf != nil {
		in.pool.Put(in.buf)
		in.buf = nil
	}
}

package http2conn

import (
	"io"
	"runtime"

	"google.golang.org/grpc/mem"
)

// Sizes of the read buffer in bytes. A read that fills it with long data makes the next one larger,
// and a short read smaller: most connections are idle most of the time, and many small frames take
// much time, in which other connections wait.
const (
	minInput = 4 << 10
	maxInput = 256 << 10
	longData = 1 << 10 // bytes of a frame
)

// input is a buffered reader for one goroutine.
type input struct {
	read func([]byte) (int, error) // from the connection
	pool mem.BufferPool
	buf  *[]byte
	r, w int // of buf, what was read and not returned
	long int // bytes of buf that were long data
}

// Read implements io.Reader.
func (in *input) Read(b []byte) (int, error) {
	have, err := in.next(len(b))
	return copy(b, have), err
}

// next returns up to n bytes, at least one, that are valid until the next call.
func (in *input) next(n int) ([]byte, error) {
	if in.r == in.w {
		if err := in.fill(); err != nil {
			return nil, err
		}
	}
	b := (*in.buf)[in.r:min(in.w, in.r+n)]
	in.r += len(b)
	if n >= longData {
		in.long += len(b)
	}
	return b, nil
}

// fill reads once, into an empty buffer.
func (in *input) fill() error {
	if in.buf == nil {
		in.resize(minInput)
	} else if size := len(*in.buf); in.w == size && size < maxInput && in.long > size/2 {
		in.resize(4 * size)
	} else if in.w < size/16 && size > minInput {
		in.resize(size / 4)
	}
	if in.w == len(*in.buf) { // there is more to read, for which this connection need not wait
		runtime.Gosched()
	}
	n, err := in.read(*in.buf)
	in.r, in.w, in.long = 0, n, 0
	if n > 0 {
		return nil // the next read returns an error that came with bytes
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// collect returns what was read and not returned: n bytes at least, or what there is if n bytes do
// not fit into the buffer. It reads into the rest of the buffer until it has them.
func (in *input) collect(n int) ([]byte, error) {
	if in.r == in.w {
		if err := in.fill(); err != nil {
			return nil, err
		}
	}
	for in.w-in.r < n && n <= len(*in.buf) {
		if in.w == len(*in.buf) {
			runtime.Gosched() // as fill does
		}
		in.w = copy(*in.buf, (*in.buf)[in.r:in.w])
		in.r = 0
		read, err := in.read((*in.buf)[in.w:])
		if in.w += read; read == 0 {
			if err == nil {
				err = io.ErrNoProgress
			}
			return nil, err
		}
	}
	return (*in.buf)[in.r:in.w], nil
}

// buffered is how many bytes were read and not returned.
func (in *input) buffered() int { return in.w - in.r }

// resize replaces the empty buffer.
func (in *input) resize(size int) {
	in.free()
	in.buf = in.pool.Get(size)
}

// free returns the buffer to the pool.
func (in *input) free() {
	if in.buf != nil {
		in.pool.Put(in.buf)
		in.buf = nil
	}
}

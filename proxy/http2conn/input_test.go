package http2conn

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
)

// pieces is a connection that has something to say in pieces. Of a piece that does not fit the rest
// comes with the next read.
type pieces struct {
	left  [][]byte
	sizes []int // of the buffers that were offered
}

func (p *pieces) read(b []byte) (int, error) {
	p.sizes = append(p.sizes, len(b))
	if len(p.left) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.left[0])
	if p.left[0] = p.left[0][n:]; len(p.left[0]) == 0 {
		p.left = p.left[1:]
	}
	return n, nil
}

// all takes everything, at most n bytes at once.
func (in *input) all(n int) (got []byte, err error) {
	for {
		b, err := in.next(n)
		if err != nil {
			return got, err
		}
		got = append(got, b...)
	}
}

// TestManySmallFrames are read in small pieces, so that no other connection waits for long.
func TestManySmallFrames(t *testing.T) {
	pool := new(ledger)
	from := &pieces{left: [][]byte{pattern(1 << 20)}}
	in := &input{read: from.read, pool: pool}
	if got, err := in.all(100); len(got) != 1<<20 || !errors.Is(err, io.EOF) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if largest := slices.Max(from.sizes); largest != minInput {
		t.Errorf("up to %d bytes were read at once", largest)
	}
	in.free()
	pool.check(t)
}

// TestInputGrowsAndShrinks: long data is read at once, up to a limit, and an idle peer costs
// little.
func TestInputGrowsAndShrinks(t *testing.T) {
	pool := new(ledger)
	from := &pieces{left: [][]byte{pattern(1 << 20), pattern(100), pattern(100), pattern(100), pattern(100), pattern(100)}}
	in := &input{read: from.read, pool: pool}
	got, err := in.all(1 << 20)
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	want := slices.Repeat(pattern(100), 5)
	same(t, "input", got, append(slices.Clone(pattern(1<<20)), want...))
	const kib = 1 << 10
	// The rest of the million comes with the seventh read.
	sizes := []int{4 * kib, 16 * kib, 64 * kib, 256 * kib, 256 * kib, 256 * kib, 256 * kib, 256 * kib, 64 * kib, 16 * kib, 4 * kib, 4 * kib, 4 * kib}
	if !slices.Equal(from.sizes, sizes) {
		t.Errorf("the buffers were of %v, want %v", from.sizes, sizes)
	}
	if pool.out() != 1 {
		t.Errorf("%d buffers are out", pool.out())
	}
	in.free()
	in.free()
	pool.check(t)
}

// TestInputKeepsItsBuffer: small reads, which are most, do not each take another buffer.
func TestInputKeepsItsBuffer(t *testing.T) {
	pool := new(ledger)
	from := &pieces{left: slices.Repeat([][]byte{pattern(9)}, 100)}
	in := &input{read: from.read, pool: pool}
	if got, err := io.ReadAll(in); err != nil || len(got) != 900 {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if len(pool.gets) != 1 {
		t.Errorf("%d buffers were taken", len(pool.gets))
	}
	in.free()
	pool.check(t)
}

// TestInputInPieces: however little is taken at once, all of it is, in order.
func TestInputInPieces(t *testing.T) {
	for _, each := range []int{1, 9, 4095, 4096, 4097, 1 << 20} {
		pool := new(ledger)
		from := &pieces{left: [][]byte{pattern(10_000), pattern(1), pattern(4096), pattern(5)}}
		in := &input{read: from.read, pool: pool}
		var got bytes.Buffer
		for b := make([]byte, each); ; {
			n, err := in.Read(b)
			got.Write(b[:n])
			if err != nil {
				break
			}
		}
		same(t, "input", got.Bytes(), slices.Concat(pattern(10_000), pattern(1), pattern(4096), pattern(5)))
		in.free()
		pool.check(t)
	}
}

// TestInputErrorWithBytes: an error that comes with bytes is not lost, nor are they.
func TestInputErrorWithBytes(t *testing.T) {
	failure := errors.New("failure")
	reads := 0
	in := &input{pool: new(ledger), read: func(b []byte) (int, error) {
		if reads++; reads == 1 {
			return copy(b, "bytes"), failure
		}
		return 0, failure
	}}
	if got, err := io.ReadAll(in); string(got) != "bytes" || !errors.Is(err, failure) {
		t.Errorf("got %q, %v", got, err)
	}
}

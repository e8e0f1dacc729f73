package http2conn

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// framerDecoder decodes blocks as http2.Framer does: it is what headerDecoder must agree with.
type framerDecoder struct {
	*http2.Framer
	in bytes.Buffer
}

func newFramerDecoder(limit uint32) *framerDecoder {
	d := &framerDecoder{}
	d.Framer = http2.NewFramer(&d.in, &d.in)
	d.ReadMetaHeaders = hpack.NewDecoder(tableSize, nil)
	d.MaxHeaderListSize = limit
	return d
}

func (d *framerDecoder) decode(block []byte) (headerList, error) {
	d.in.Reset()
	_ = d.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true})
	f, err := d.ReadFrame()
	if err != nil {
		return headerList{}, err
	}
	list := headerList{fields: f.(*http2.MetaHeadersFrame).Fields, truncated: f.(*http2.MetaHeadersFrame).Truncated}
	list.inspect(true)
	return list, nil
}

// minLimit is the smallest limit with which http2.Framer decodes each block of one frame: it
// refuses a block of more than four times the limit.
const minLimit = maxFrameSize / 4

// kindOf is what an error makes of a connection: 0 nothing, 1 a stream is reset, 2 it ends.
func kindOf(err error) int {
	switch _, stream := errors.AsType[http2.StreamError](err); {
	case err == nil:
		return 0
	case stream:
		return 1
	}
	return 2
}

// agree decodes blocks with both decoders, until one ends the connection.
func agree(t *testing.T, limit uint32, blocks [][]byte) {
	t.Helper()
	mine, want := newHeaderDecoder(limit), newFramerDecoder(limit)
	mine.strict = true
	for i, block := range blocks {
		if len(block) > maxFrameSize {
			return
		}
		got, err := mine.decode(1, block)
		list, wantErr := want.decode(block)
		if kindOf(err) != kindOf(wantErr) {
			t.Fatalf("block %d %q: error %v, http2.Framer has %v", i, block, err, wantErr)
		}
		switch kindOf(err) {
		case 1:
			continue
		case 2:
			return
		}
		if !slices.Equal(got.fields, list.fields) || got.size != list.size || got.truncated != list.truncated || got.declared != list.declared || got.malformed != list.malformed {
			t.Fatalf("block %d %q: %+v, http2.Framer has %+v", i, block, got, list)
		}
	}
}

// FuzzHeaderBlocks: all blocks of a connection, which blockEnd separates, mean the same to the
// decoder and to http2.Framer.
func FuzzHeaderBlocks(f *testing.F) {
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	var all []byte
	for _, list := range [][]hpack.HeaderField{
		request, request, fields(":status", "200"), request, append(slices.Clone(request), fields("grpc-timeout", "1S")...),
		request, fields("trailer", "a,b,c", "x", "\n"), request, fields("x", "y", ":path", "/"), fields(":path", "/", ":status", "200"),
		fields(":path", "/", ":path", "/"), fields(":odd", ""), fields("Upper", ""), fields("", "x"), request, fields("content-length", "5"),
	} {
		block.Reset()
		for _, f := range list {
			_ = e.WriteField(f)
		}
		all = append(append(all, block.Bytes()...), blockEnd)
	}
	f.Add(all, uint16(1000))
	f.Add(all, uint16(0))
	f.Add([]byte("\x82\x3e\x20\x82\x3e\x82\x3e\x40\x01a\x01b\x3e\xbe\x3e\x20\xbe\x3e\xbe\x3e\x80\x3e"), uint16(1000))
	f.Fuzz(func(t *testing.T, all []byte, limit uint16) {
		agree(t, minLimit+uint32(limit), bytes.Split(all, []byte{blockEnd}))
	})
}

const blockEnd = 0x3e

// TestHeaderDecoderAgrees: connections with many repeated header lists, among them some that change
// the dynamic table or its size, mean the same to the decoder and to http2.Framer.
func TestHeaderDecoderAgrees(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	values := []string{"", "a", "b", "application/grpc", strings.Repeat("v", 900), strings.Repeat("w", 5000), "\x00"}
	for range 200 {
		var block bytes.Buffer
		e := hpack.NewEncoder(&block)
		e.SetMaxDynamicTableSizeLimit(tableSize)
		var blocks [][]byte
		for range 60 {
			block.Reset()
			if r.IntN(20) == 0 {
				e.SetMaxDynamicTableSize(uint32(r.IntN(tableSize)))
			}
			for _, f := range request[:1+r.IntN(len(request))] {
				_ = e.WriteField(f)
			}
			for range r.IntN(3) {
				name := []string{"x", "y", "trailer", "te", ":authority"}[r.IntN(5)]
				_ = e.WriteField(hpack.HeaderField{Name: name, Value: values[r.IntN(len(values))], Sensitive: r.IntN(5) == 0})
			}
			blocks = append(blocks, bytes.Clone(block.Bytes()))
		}
		agree(t, MaxHeaderListSize, blocks)
		agree(t, minLimit, blocks)
	}
}

// TestHeaderEncoderAgrees: what the encoder encodes, a decoder decodes to the same fields. The last
// one does not have it forget the others.
func TestHeaderEncoderAgrees(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var e headerEncoder
	e.hpack = hpack.NewEncoder(&e.block)
	d := hpack.NewDecoder(tableSize, nil)
	known := 0
	for i := range 5000 {
		if r.IntN(100) == 0 {
			e.setTableSize(uint32(r.IntN(tableSize)))
		}
		list := slices.Clone(request[:r.IntN(len(request)+1)])
		if r.IntN(5) == 0 {
			list = append(list, hpack.HeaderField{Name: "grpc-timeout", Value: strings.Repeat("1", r.IntN(300)), Sensitive: r.IntN(4) == 0})
		}
		entries := len(e.memo.entries)
		want, last := list, hpack.HeaderField{}
		if r.IntN(2) == 0 {
			last = hpack.HeaderField{Name: "grpc-timeout", Value: strings.Repeat("2", 1+r.IntN(9))}
			want = append(slices.Clone(list), hpack.HeaderField{Name: last.Name, Value: last.Value, Sensitive: true})
		}
		got, err := d.DecodeFull(e.encode(list, last))
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("list %d: got %v, want %v: %v", i, got, want, err)
		}
		if entries > 0 && len(e.memo.entries) == entries {
			known++
		}
	}
	if known < 1000 {
		t.Errorf("%d lists were encoded from memory", known)
	}
}

// TestAllocations: a call allocates its stream on each side, and nothing else.
func TestAllocations(t *testing.T) {
	if raced {
		t.Skip("the race detector allocates; make unit runs this test without it, too")
	}
	const calls, most = 5000, 2.2 // a read that ends within a frame costs some
	u := newUnary(t, 100)
	for range calls { // it fills the pools
		u.call()
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range calls {
		u.call()
	}
	runtime.ReadMemStats(&after)
	u.close()
	if n := float64(after.Mallocs-before.Mallocs) / calls; n > most {
		t.Errorf("%.2f allocations for a call, want at most %.1f", n, most)
	}
}

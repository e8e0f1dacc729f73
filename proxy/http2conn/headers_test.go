package http2conn

import (
	"bytes"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// long is header fields that make a block of more than n bytes, which no table shortens.
func long(n int) (all []hpack.HeaderField) {
	for i := 0; n > 0; i++ {
		size := min(n, 8<<10)
		all = append(all, hpack.HeaderField{Name: fmt.Sprint("x", i), Value: strings.Repeat("~", size), Sensitive: true})
		n -= size
	}
	return all
}

// TestLongHeadersOut are sent in as many frames as the peer takes them in, and nothing comes
// between.
func TestLongHeadersOut(t *testing.T) {
	for _, n := range []int{maxFrameSize - 1000, maxFrameSize - 20, maxFrameSize, 2 * maxFrameSize, 100_000, 1 << 20} {
		for _, largest := range []uint32{0, maxFrameSize + 1, 1<<24 - 1} {
			synctest.Test(t, func(t *testing.T) {
				var settings []http2.Setting
				if largest > 0 {
					settings = append(settings, http2.Setting{ID: http2.SettingMaxFrameSize, Val: largest})
				}
				h := &handler{}
				p := serveOne(t, h, Config{}, settings...)
				s := p.begin(t, h, 1, true)
				all := long(n)
				s.Headers(all, false)
				s.Headers(all, true) // the table of the peer is as ours after that
				h.conn.Flush()
				want := "HEADERS 1"
				for _, f := range all {
					want += " " + f.Name + "=" + f.Value
				}
				if got := p.says(t); !slices.Equal(got, []string{want, want + " end"}) {
					t.Errorf("%d bytes in frames of %d: %d frames", n, largest, len(got))
				}
			})
		}
	}
}

// TestLongHeadersIn come in frames of any size.
func TestLongHeadersIn(t *testing.T) {
	for _, server := range []bool{true, false} {
		for _, each := range []int{1000, maxFrameSize} {
			synctest.Test(t, func(t *testing.T) {
				var got []hpack.HeaderField
				h := &handler{headers: func(_ *Stream, fields []hpack.HeaderField, _ bool) { got = slices.Clone(fields) }}
				var p *peer
				all := slices.Concat(request, long(60_000))
				if server {
					p = serveOne(t, h, Config{})
				} else {
					p = dialOne(t, h, Config{})
					h.conn.Open(nil, request, true)
					h.conn.Flush()
					all = all[4:] // without the pseudo header fields of a request
				}
				p.says(t)
				p.inFrames(1, p.coded(all), each)
				p.expect(t)
				if !slices.Equal(got, all) {
					t.Errorf("server %t: %d fields came, want %d", server, len(got), len(all))
				}
			})
		}
	}
}

// inFrames sends a block of header fields in frames of a size.
func (p *peer) inFrames(id uint32, block []byte, each int) {
	n := min(len(block), each)
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block[:n], EndHeaders: n == len(block)})
	for block = block[n:]; len(block) > 0; block = block[n:] {
		n = min(len(block), each)
		p.WriteContinuation(id, n == len(block), block[:n])
	}
}

// TestTooLongHeaders: fields that are longer than the limit are refused where a few bytes of HPACK
// mean them, and the connection goes on; who sends as much is left.
func TestTooLongHeaders(t *testing.T) {
	big := hpack.HeaderField{Name: "x", Value: strings.Repeat("v", 4000)}
	for _, server := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			began := 0
			var codes []http2.ErrCode
			h := &handler{
				headers: func(*Stream, []hpack.HeaderField, bool) { began++ },
				reset:   func(_ *Stream, code http2.ErrCode) { codes = append(codes, code) },
			}
			var p *peer
			// 20 MB
			all := append(slices.Clone(request), slices.Repeat([]hpack.HeaderField{big}, 5000)...)
			if server {
				p = serveOne(t, h, Config{})
			} else {
				p = dialOne(t, h, Config{})
				h.conn.Open(nil, request, true)
				h.conn.Open(nil, request, true)
				h.conn.Flush()
				all = all[4:]
			}
			p.says(t)
			p.headers(1, false, all)
			if server {
				p.expect(t, "HEADERS 1 :status=431 content-type=application/grpc grpc-status=8 grpc-message="+textHeaderList+" end", "RST_STREAM 1 NO_ERROR")
			} else {
				p.expect(t, "RST_STREAM 1 FRAME_SIZE_ERROR")
			}
			if began > 0 || server == (len(codes) > 0) {
				t.Errorf("server %t: %d streams began, and the handler heard %v", server, began, codes)
			}
			p.headers(3, true, all[:10]) // the table is as the peer's
			if p.expect(t); began != 1 {
				t.Error("the next stream did not begin")
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		h := &handler{headers: func(*Stream, []hpack.HeaderField, bool) { t.Error("it began") }}
		p := serveOne(t, h, Config{})
		p.inFrames(1, p.coded(slices.Concat(request, long(20<<20))), maxFrameSize)
		p.expect(t, fmt.Sprintf("GOAWAY 1 PROTOCOL_ERROR %q", textHeaders))
	})
}

// TestTinyHeaderFields: the 32 bytes of each field count, no more fields than fit are ever there,
// and the connection stays while the block fits into one frame.
func TestTinyHeaderFields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got int
		h := &handler{headers: func(_ *Stream, fields []hpack.HeaderField, _ bool) { got = len(fields) }}
		p := serveOne(t, h, Config{})
		tiny := hpack.HeaderField{Name: "a"}
		size := 0
		for _, f := range request {
			size += int(f.Size())
		}
		fits := (MaxHeaderListSize - size) / int(tiny.Size())
		block := func(n int) []byte {
			return p.coded(append(slices.Clone(request), slices.Repeat([]hpack.HeaderField{tiny}, n)...))
		}
		p.inFrames(1, block(fits), maxFrameSize)
		if p.expect(t); got != len(request)+fits {
			t.Errorf("%d fields came, want %d", got, len(request)+fits)
		}
		for id := uint32(3); id < 9; id += 2 {
			p.inFrames(id, block(fits+1), maxFrameSize)
			if all := p.says(t); len(all) != 2 || !strings.Contains(all[0], "grpc-status=8") {
				t.Errorf("one field too many: %q", all)
			}
		}
		var before, after runtime.MemStats
		long := bytes.Clone(block(400_000))
		runtime.ReadMemStats(&before)
		p.inFrames(9, long, maxFrameSize)
		p.expect(t, fmt.Sprintf("GOAWAY 9 PROTOCOL_ERROR %q", textHeaders))
		runtime.ReadMemStats(&after)
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
			t.Errorf("400,000 fields took %d KiB", grown>>10)
		}
	})
}

// TestBadHeaders: what is no header block ends the connection, and what is one but none of a call
// ends the stream.
func TestBadHeaders(t *testing.T) {
	for name, try := range map[string]struct {
		fields []hpack.HeaderField
		block  string
		want   string
	}{
		"upper case":          {fields: append(slices.Clone(request), fields("Upper", "x")...), want: "RST_STREAM 1 PROTOCOL_ERROR"},
		"bad value":           {fields: append(slices.Clone(request), fields("x", "\n")...), want: "RST_STREAM 1 PROTOCOL_ERROR"},
		"pseudo field at end": {fields: append(slices.Clone(request), fields(":path", "x")...), want: "RST_STREAM 1 PROTOCOL_ERROR"},
		"unknown index":       {block: "\xff\xff\x01", want: fmt.Sprintf("GOAWAY 1 COMPRESSION_ERROR %q", textHeaders)},
		"half a field":        {block: "\x00\x05a", want: fmt.Sprintf("GOAWAY 1 COMPRESSION_ERROR %q", textHeaders)},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{headers: func(*Stream, []hpack.HeaderField, bool) { t.Errorf("%s: it began", name) }}
			p := serveOne(t, h, Config{})
			block := []byte(try.block)
			if try.fields != nil {
				block = p.coded(try.fields)
			}
			p.inFrames(1, block, maxFrameSize)
			p.expect(t, try.want)
		})
	}
}

// TestTableSize: a peer that wants a smaller table for header fields, or none, gets it.
func TestTableSize(t *testing.T) {
	for _, size := range []uint32{0, 100, 4096, 1 << 20} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: size})
			for id := uint32(1); id < 20; id += 2 {
				p.begin(t, h, id, true).Headers(okTrailer, true)
				h.conn.Flush()
				p.expect(t, fmt.Sprint("HEADERS ", id, " grpc-status=0 end"))
			}
			if got := h.conn.out.encoder.hpack.MaxDynamicTableSize(); got != min(size, 4096) {
				t.Errorf("the table has %d bytes, want %d", got, size)
			}
		})
	}
}

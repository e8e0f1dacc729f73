package http2conn

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// raw sends a frame whose header may be wrong.
func (p *peer) raw(kind http2.FrameType, flags http2.Flags, id uint32, payload string) {
	p.WriteRawFrame(kind, flags, id, []byte(payload))
}

// TestViolations: a client that breaks the protocol is sent the code of RFC 9113 for it. Stream 1
// is open, 3 is half-closed by the client, 5 has been reset by the client, 7 by the server, and 9
// is the first that was not opened.
func TestViolations(t *testing.T) {
	const (
		idle   = `GOAWAY 7 PROTOCOL_ERROR "frame on a stream that was never opened"`
		window = `GOAWAY 7 FLOW_CONTROL_ERROR "flow-control window larger than 2^31-1"`
	)
	for name, try := range map[string]struct {
		say  func(p *peer)
		want []string
	}{
		"DATA on an idle stream":              {func(p *peer) { p.WriteData(9, true, []byte("x")) }, []string{idle}},
		"padded DATA on an idle stream":       {func(p *peer) { p.WriteDataPadded(9, true, nil, nil) }, []string{idle}},
		"DATA on a stream of the server's":    {func(p *peer) { p.WriteData(2, true, nil) }, []string{idle}},
		"RST_STREAM of an idle stream":        {func(p *peer) { p.WriteRSTStream(9, http2.ErrCodeCancel) }, []string{idle}},
		"WINDOW_UPDATE of an idle stream":     {func(p *peer) { p.WriteWindowUpdate(9, 1) }, []string{idle}},
		"WINDOW_UPDATE by 0 of an idle one":   {func(p *peer) { p.WriteWindowUpdate(9, 0) }, []string{idle}},
		"CONTINUATION of nothing":             {func(p *peer) { p.WriteContinuation(1, true, nil) }, []string{`GOAWAY 7 PROTOCOL_ERROR "unexpected CONTINUATION for stream 1"`}},
		"DATA after END_STREAM":               {func(p *peer) { p.WriteData(3, false, []byte("x")) }, []string{"RST_STREAM 3 STREAM_CLOSED"}},
		"DATA twice after END_STREAM":         {func(p *peer) { p.WriteData(3, false, nil); p.WriteData(3, false, nil) }, []string{"RST_STREAM 3 STREAM_CLOSED"}},
		"HEADERS after END_STREAM":            {func(p *peer) { p.headers(3, true, nil) }, []string{"RST_STREAM 3 STREAM_CLOSED"}},
		"DATA after RST_STREAM":               {func(p *peer) { p.WriteData(5, false, []byte("x")) }, []string{"RST_STREAM 5 STREAM_CLOSED"}},
		"DATA twice after RST_STREAM":         {func(p *peer) { p.WriteData(5, false, nil); p.WriteData(5, false, nil) }, []string{"RST_STREAM 5 STREAM_CLOSED"}},
		"DATA after the server's RST_STREAM":  {func(p *peer) { p.WriteData(7, false, []byte("x")) }, nil},
		"WINDOW_UPDATE after RST_STREAM":      {func(p *peer) { p.WriteWindowUpdate(5, 1) }, nil},
		"RST_STREAM after RST_STREAM":         {func(p *peer) { p.WriteRSTStream(5, http2.ErrCodeCancel) }, nil},
		"WINDOW_UPDATE by 0":                  {func(p *peer) { p.WriteWindowUpdate(1, 0) }, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		"WINDOW_UPDATE over the top":          {func(p *peer) { p.WriteWindowUpdate(1, 1<<31-1) }, []string{"RST_STREAM 1 FLOW_CONTROL_ERROR"}},
		"WINDOW_UPDATE of all over the top":   {func(p *peer) { p.WriteWindowUpdate(0, 1<<31-1) }, []string{window}},
		"SETTINGS over the top":               {func(p *peer) { p.WriteWindowUpdate(1, 1<<30); p.WriteSettings(windowOf(1 << 30)) }, []string{window}},
		"a window of 2^31":                    {func(p *peer) { p.WriteSettings(windowOf(1 << 31)) }, []string{`GOAWAY 7 FLOW_CONTROL_ERROR ""`}},
		"ENABLE_PUSH of 2":                    {func(p *peer) { p.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 2}) }, []string{`GOAWAY 7 PROTOCOL_ERROR ""`}},
		"MAX_FRAME_SIZE of 16383":             {func(p *peer) { p.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 16383}) }, []string{`GOAWAY 7 PROTOCOL_ERROR ""`}},
		"MAX_FRAME_SIZE of 2^24":              {func(p *peer) { p.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 24}) }, []string{`GOAWAY 7 PROTOCOL_ERROR ""`}},
		"SETTINGS of five bytes":              {func(p *peer) { p.raw(http2.FrameSettings, 0, 0, "12345") }, []string{`GOAWAY 7 FRAME_SIZE_ERROR ""`}},
		"PING of seven bytes":                 {func(p *peer) { p.raw(http2.FramePing, 0, 0, "1234567") }, []string{`GOAWAY 7 FRAME_SIZE_ERROR ""`}},
		"PING on a stream":                    {func(p *peer) { p.raw(http2.FramePing, 0, 1, "12345678") }, []string{`GOAWAY 7 PROTOCOL_ERROR ""`}},
		"a frame that is too large":           {func(p *peer) { p.WriteData(1, false, make([]byte, maxFrameSize+1)) }, []string{`GOAWAY 7 FRAME_SIZE_ERROR "frame larger than SETTINGS_MAX_FRAME_SIZE"`}},
		"PUSH_PROMISE":                        {func(p *peer) { p.raw(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, 1, "\x00\x00\x00\x02") }, []string{`GOAWAY 7 PROTOCOL_ERROR "PUSH_PROMISE from a client"`}},
		"PRIORITY":                            {func(p *peer) { p.WritePriority(1, http2.PriorityParam{StreamDep: 3}) }, nil},
		"PRIORITY of an idle stream":          {func(p *peer) { p.WritePriority(9, http2.PriorityParam{StreamDep: 1}) }, nil},
		"PRIORITY after itself":               {func(p *peer) { p.WritePriority(1, http2.PriorityParam{StreamDep: 1}) }, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		"PRIORITY of an idle stream on it":    {func(p *peer) { p.WritePriority(9, http2.PriorityParam{StreamDep: 9}) }, []string{`GOAWAY 7 PROTOCOL_ERROR "stream that depends on itself"`}},
		"HEADERS after themselves":            {func(p *peer) { p.depends(9, 9) }, []string{"RST_STREAM 9 PROTOCOL_ERROR"}},
		"a trailer":                           {func(p *peer) { p.headers(1, true, fields("a", "b")) }, nil},
		"a trailer without END_STREAM":        {func(p *peer) { p.headers(1, false, fields("a", "b")) }, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		"a trailer with pseudo-header fields": {func(p *peer) { p.headers(1, true, request) }, []string{"RST_STREAM 1 PROTOCOL_ERROR"}},
		"HEADERS that are wrong, and then DATA": {func(p *peer) { p.headers(9, false, fields("UPPER", "case")); p.WriteData(9, true, nil) },
			[]string{"RST_STREAM 9 PROTOCOL_ERROR"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{})
			p.begin(t, h, 1, false)
			p.begin(t, h, 3, true)
			p.begin(t, h, 5, false)
			p.WriteRSTStream(5, http2.ErrCodeCancel)
			p.begin(t, h, 7, false).Reset(http2.ErrCodeCancel)
			h.conn.Flush()
			p.expect(t, "RST_STREAM 7 CANCEL")
			try.say(p)
			want := try.want
			if got := p.says(t); !slices.Equal(got, want) {
				t.Errorf("%s: the client was sent %q, want %q", name, got, want)
			}
			if len(want) > 0 && want[0][0] == 'G' {
				time.Sleep(lingerTimeout)
				p.expect(t, "closed")
				return
			}
			p.WritePing(false, [8]byte{'x'}) // others are served
			p.expect(t, `PING ack "x"`)
		})
	}
}

// depends begins a stream that depends on another.
func (p *peer) depends(id, on uint32) {
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.coded(request), EndHeaders: true, Priority: http2.PriorityParam{StreamDep: on, Weight: 1}})
}

// TestTrailerOfAClient ends the request.
func TestTrailerOfAClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ends := 0
		h := &handler{data: func(_ *Stream, _ []byte, end bool) {
			if end {
				ends++
			}
		}}
		p := serveOne(t, h, Config{})
		p.begin(t, h, 1, false)
		p.WriteData(1, false, []byte("x"))
		p.headers(1, true, fields("a", "b"))
		p.expect(t)
		if ends != 1 {
			t.Errorf("the request ended %d times", ends)
		}
	})
}

// TestStrict: a strict server resets requests that are malformed, and others pass on.
func TestStrict(t *testing.T) {
	without := func(name string) []hpack.HeaderField {
		return slices.DeleteFunc(slices.Clone(request), func(f hpack.HeaderField) bool { return f.Name == name })
	}
	with := func(name, value string) []hpack.HeaderField {
		return append(without(name), hpack.HeaderField{Name: name, Value: value})
	}
	pseudo := func(name, value string) []hpack.HeaderField {
		return append([]hpack.HeaderField{{Name: name, Value: value}}, without(name)...)
	}
	for name, try := range map[string]struct {
		fields []hpack.HeaderField
		data   []string // the last one ends the stream; nil: the header fields end it
		bad    bool
	}{
		"a request":                    {request, nil, false},
		"no method":                    {without(":method"), nil, true},
		"no scheme":                    {without(":scheme"), nil, true},
		"no path":                      {without(":path"), nil, true},
		"no authority":                 {without(":authority"), nil, false},
		"an empty path":                {pseudo(":path", ""), nil, true},
		"a path without a slash":       {pseudo(":path", "a"), nil, true},
		"another scheme":               {pseudo(":scheme", "ftp"), nil, true},
		"OPTIONS *":                    {fields(":method", "OPTIONS", ":scheme", "https", ":path", "*"), nil, false},
		"GET *":                        {fields(":method", "GET", ":scheme", "https", ":path", "*"), nil, true},
		"CONNECT":                      {fields(":method", "CONNECT", ":authority", "a"), nil, false},
		"CONNECT with a path":          {fields(":method", "CONNECT", ":authority", "a", ":path", "/"), nil, true},
		"TE of gzip":                   {with("te", "trailers, gzip"), nil, true},
		"Connection":                   {with("connection", "close"), nil, true},
		"Upgrade":                      {with("upgrade", "h2c"), nil, true},
		"a length of nothing":          {with("content-length", "0"), nil, false},
		"a length without data":        {with("content-length", "1"), nil, true},
		"a length that is none":        {with("content-length", "-1"), nil, true},
		"two lengths":                  {append(with("content-length", "1"), hpack.HeaderField{Name: "content-length", Value: "2"}), []string{"x"}, true},
		"as much as stated":            {with("content-length", "3"), []string{"a", "bc"}, false},
		"as much as stated, then none": {with("content-length", "3"), []string{"abc", ""}, false},
		"more than stated":             {with("content-length", "3"), []string{"abc", "d"}, true},
		"less than stated":             {with("content-length", "3"), []string{"a", "b"}, true},
	} {
		for _, strict := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				h := &handler{}
				p := serveOne(t, h, Config{Strict: strict})
				p.headers(1, try.data == nil, try.fields)
				for i, d := range try.data {
					p.WriteData(1, i == len(try.data)-1, []byte(d))
				}
				var want []string
				if try.bad && strict {
					want = []string{"RST_STREAM 1 PROTOCOL_ERROR"}
				}
				if got := p.says(t); !slices.Equal(got, want) {
					t.Errorf("%s, strict %t: the client was sent %q, want %q", name, strict, got, want)
				}
			})
		}
	}
}

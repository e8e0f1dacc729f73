package limits

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/credentials/insecure"
)

var insecureTransport = insecure.NewCredentials()

// frameClient speaks HTTP/2 frame by frame, and need not be polite.
type frameClient struct {
	net.Conn
	*http2.Framer
	headers bytes.Buffer
	encoder *hpack.Encoder
	heard   []string // what the server said, but for what every server says
}

// connect opens a connection and says nothing yet.
func connect(t *testing.T, address string) *frameClient {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return newFrameClient(conn)
}

// newFrameClient returns a frameClient over a connection.
func newFrameClient(conn net.Conn) *frameClient {
	k := &frameClient{Conn: conn, Framer: http2.NewFramer(conn, conn)}
	k.AllowIllegalWrites = true
	k.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	k.encoder = hpack.NewEncoder(&k.headers)
	return k
}

// greet is connect with the preface and empty settings.
func greet(t *testing.T, address string) *frameClient {
	t.Helper()
	k := connect(t, address)
	k.raw(http2.ClientPreface)
	_ = k.WriteSettings()
	return k
}

// raw sends bytes as they are. Whether the server still listens is what tests are about.
func (k *frameClient) raw(bytes string) { _, _ = io.WriteString(k.Conn, bytes) }

// frame sends a frame with any header. length may be another than the payload's.
func (k *frameClient) frame(length int, kind http2.FrameType, flags http2.Flags, stream uint32, payload string) {
	head := []byte{byte(length >> 16), byte(length >> 8), byte(length), byte(kind), byte(flags)}
	k.raw(string(binary.BigEndian.AppendUint32(head, stream)) + payload)
}

// block encodes headers: names and values in turn.
func (k *frameClient) block(fields ...string) []byte {
	k.headers.Reset()
	for i := 0; i < len(fields); i += 2 {
		// to memory
		_ = k.encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(k.headers.Bytes())
}

// call are the headers of a method.
func call(method string, more ...string) []string {
	return append([]string{":method", "POST", ":scheme", "http", ":path", method, ":authority", "localhost", "content-type", "application/grpc", "te", "trailers"}, more...)
}

// begin sends the headers of a call, and perhaps its only message.
func (k *frameClient) begin(stream uint32, message []byte, fields ...string) {
	block := k.block(fields...)
	_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block, EndHeaders: true})
	if message != nil {
		_ = k.WriteData(stream, true, message)
	}
}

// message is a gRPC message as it goes over a stream.
func message(flag byte, body []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{flag}, uint32(len(body))), body...)
}

func gzipped(s string) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write([]byte(s)) // to memory
	_ = w.Close()
	return b.Bytes()
}

const mark = "the mark"

// listen reads until the server closes, answers the mark, or says no more within the time. It
// returns what was heard, and how it ended.
func (k *frameClient) listen(within time.Duration) []string {
	return k.listenUntil(within, func() bool { return false })
}

// listenUntil is listen that ends once done says so, after a whole frame.
func (k *frameClient) listenUntil(within time.Duration, done func() bool) []string {
	_ = k.SetReadDeadline(time.Now().Add(within))
	for {
		if done() {
			return append(slices.Clone(k.heard), "open")
		}
		frame, err := k.ReadFrame()
		var stream http2.StreamError
		switch {
		case errors.As(err, &stream):
			k.heard = append(k.heard, fmt.Sprintf("unreadable frame on stream %d", stream.StreamID))
			continue
		case errors.Is(err, os.ErrDeadlineExceeded):
			return append(slices.Clone(k.heard), "open")
		case err != nil: // a reset is a close with bytes that nobody read
			return append(slices.Clone(k.heard), "closed")
		}
		switch f := frame.(type) {
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = k.WritePing(true, f.Data)
			} else if string(f.Data[:]) == mark {
				return append(slices.Clone(k.heard), "open")
			}
		case *http2.GoAwayFrame:
			k.heard = append(k.heard, fmt.Sprintf("GOAWAY %v %q", f.ErrCode, f.DebugData()))
		case *http2.RSTStreamFrame:
			if f.ErrCode == http2.ErrCodeNo {
				continue // the answer came before the request had ended, which is a matter of luck
			}
			k.heard = append(k.heard, fmt.Sprintf("RST_STREAM %d %v", f.StreamID, f.ErrCode))
		case *http2.MetaHeadersFrame:
			var fields []string
			for _, h := range f.Fields {
				fields = append(fields, h.Name+": "+h.Value)
			}
			k.heard = append(k.heard, fmt.Sprintf("HEADERS %d %s", f.StreamID, strings.Join(fields, ", ")))
		case *http2.DataFrame:
			k.heard = append(k.heard, fmt.Sprintf("DATA %d", f.StreamID))
		}
	}
}

// settled asks for an answer to a PING, so that what was said before has been understood, and
// listens.
func (k *frameClient) settled() []string {
	_ = k.WritePing(false, [8]byte([]byte(mark)))
	return k.listen(5 * time.Second)
}

// TestGarbage: whatever is no HTTP/2, or no gRPC, is answered as etcd's server answers it, and
// costs nobody else anything.
func TestGarbage(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil)
	before := s.usage(t)
	done := s.honestClient(t)
	t.Run("frames", s.garbage)
	t.Run("bytes", s.noHTTP)
	done()
	s.settles(t, before)
}

// goAways are the violations of HTTP/2 that the proxy answers with the error code of RFC 9113,
// where etcd without TLS just closes the connection or takes no notice.
var goAways = map[string]http2.ErrCode{
	"SETTINGS of five bytes":                http2.ErrCodeFrameSize,
	"SETTINGS on a stream":                  http2.ErrCodeProtocol,
	"SETTINGS that acknowledge with a body": http2.ErrCodeFrameSize,
	"a setting that is too great":           http2.ErrCodeFlowControl,
	"a frame size that is too small":        http2.ErrCodeProtocol,
	"PING of seven bytes":                   http2.ErrCodeFrameSize,
	"PING on a stream":                      http2.ErrCodeProtocol,
	"RST_STREAM of three bytes":             http2.ErrCodeFrameSize,
	"RST_STREAM of no stream":               http2.ErrCodeProtocol,
	"RST_STREAM of a stream to come":        http2.ErrCodeProtocol,
	"WINDOW_UPDATE by nothing":              http2.ErrCodeProtocol,
	"WINDOW_UPDATE over the top":            http2.ErrCodeFlowControl,
	"a frame of 16 MiB":                     http2.ErrCodeFrameSize,
	"DATA on no stream":                     http2.ErrCodeProtocol,
	"DATA on a stream to come":              http2.ErrCodeProtocol,
	"DATA with more padding than data":      http2.ErrCodeProtocol,
	"HEADERS on no stream":                  http2.ErrCodeProtocol,
	"HEADERS that no decoder takes":         http2.ErrCodeCompression,
	"HEADERS in the midst of others":        http2.ErrCodeProtocol,
	"CONTINUATION of nothing":               http2.ErrCodeProtocol,
	"PUSH_PROMISE":                          http2.ErrCodeProtocol,
	"PRIORITY of four bytes":                http2.ErrCodeFrameSize,
}

// garbage compares what the servers say, word for word, but for the codes that only the proxy
// sends.
func (s *site) garbage(t *testing.T) {
	rangeMethod := call("/etcdserverpb.KV/Range")
	for name, say := range map[string]func(*frameClient){
		"nothing wrong":          func(k *frameClient) { k.begin(1, message(0, []byte("\x0a\x01k")), call("/etcdserverpb.KV/Nothing")...) },
		"SETTINGS of five bytes": func(k *frameClient) { k.frame(5, http2.FrameSettings, 0, 0, "12345") },
		"SETTINGS on a stream":   func(k *frameClient) { k.frame(0, http2.FrameSettings, 0, 1, "") },
		"SETTINGS that acknowledge with a body": func(k *frameClient) {
			k.frame(6, http2.FrameSettings, http2.FlagSettingsAck, 0, "\x00\x03\x00\x00\x00\x01")
		},
		"a setting that is too great": func(k *frameClient) {
			_ = k.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31})
		},
		"a frame size that is too small": func(k *frameClient) { _ = k.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1}) },
		"a setting that nobody knows":    func(k *frameClient) { _ = k.WriteSettings(http2.Setting{ID: 0xff, Val: 1}) },
		"PING of seven bytes":            func(k *frameClient) { k.frame(7, http2.FramePing, 0, 0, "1234567") },
		"PING on a stream":               func(k *frameClient) { k.frame(8, http2.FramePing, 0, 1, "12345678") },
		"RST_STREAM of three bytes":      func(k *frameClient) { k.begin(1, nil, rangeMethod...); k.frame(3, http2.FrameRSTStream, 0, 1, "123") },
		"RST_STREAM of no stream":        func(k *frameClient) { k.frame(4, http2.FrameRSTStream, 0, 0, "\x00\x00\x00\x08") },
		"RST_STREAM of a stream to come": func(k *frameClient) { k.frame(4, http2.FrameRSTStream, 0, 7, "\x00\x00\x00\x08") },
		"WINDOW_UPDATE by nothing":       func(k *frameClient) { _ = k.WriteWindowUpdate(0, 0) },
		"WINDOW_UPDATE over the top":     func(k *frameClient) { _ = k.WriteWindowUpdate(0, 1<<31-1); _ = k.WriteWindowUpdate(0, 1<<31-1) },
		"a frame of 16 MiB":              func(k *frameClient) { k.frame(1<<24-1, http2.FrameData, 0, 1, strings.Repeat("x", 64<<10)) },
		"a frame that is cut off": func(k *frameClient) {
			k.frame(100, http2.FrameHeaders, 0, 1, "x")
			_ = k.Conn.(*net.TCPConn).CloseWrite()
		},
		"a frame of no known type": func(k *frameClient) { k.frame(3, 0x55, 0xff, 0, "123") },
		"DATA on no stream":        func(k *frameClient) { k.frame(1, http2.FrameData, 0, 0, "x") },
		"DATA on a stream to come": func(k *frameClient) { k.frame(1, http2.FrameData, 0, 9, "x") },
		"DATA with more padding than data": func(k *frameClient) {
			k.begin(1, nil, rangeMethod...)
			k.frame(2, http2.FrameData, http2.FlagDataPadded, 1, "\xffx")
		},
		"HEADERS on a server's stream": func(k *frameClient) { k.begin(2, nil, rangeMethod...) },
		"HEADERS on no stream":         func(k *frameClient) { k.begin(0, nil, rangeMethod...) },
		"streams that go backwards":    func(k *frameClient) { k.begin(5, nil, rangeMethod...); k.begin(3, nil, rangeMethod...) },
		"HEADERS that no decoder takes": func(k *frameClient) {
			k.frame(4, http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, "\xff\xff\xff\xff")
		},
		"HEADERS in the midst of others": func(k *frameClient) { k.frame(1, http2.FrameHeaders, 0, 1, "\x82"); k.begin(3, nil, rangeMethod...) },
		"CONTINUATION of nothing":        func(k *frameClient) { _ = k.WriteContinuation(1, true, nil) },
		"PUSH_PROMISE": func(k *frameClient) {
			k.frame(5, http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, 1, "\x00\x00\x00\x02\x82")
		},
		"PRIORITY of four bytes": func(k *frameClient) { k.frame(4, http2.FramePriority, 0, 1, "1234") },
		"GOAWAY and then a call": func(k *frameClient) { _ = k.WriteGoAway(0, http2.ErrCodeNo, nil); k.begin(1, nil, rangeMethod...) },
		"no path": func(k *frameClient) {
			k.begin(1, nil, ":method", "POST", ":scheme", "http", "content-type", "application/grpc", "te", "trailers")
		},
		"a path without a slash":  func(k *frameClient) { k.begin(1, message(0, nil), call("nothing")...) },
		"a path without a method": func(k *frameClient) { k.begin(1, message(0, nil), call("/nothing")...) },
		"two paths":               func(k *frameClient) { k.begin(1, nil, call("/a/b", ":path", "/c/d")...) },
		"GET": func(k *frameClient) {
			k.begin(1, nil, ":method", "GET", ":scheme", "http", ":path", "/etcdserverpb.KV/Range", "content-type", "application/grpc", "te", "trailers")
		},
		"JSON": func(k *frameClient) {
			k.begin(1, nil, ":method", "POST", ":scheme", "http", ":path", "/v3/kv/range", "content-type", "application/json")
		},
		"a Connection header":         func(k *frameClient) { k.begin(1, nil, append(rangeMethod, "connection", "close")...) },
		"a name in capitals":          func(k *frameClient) { k.begin(1, nil, append(rangeMethod, "Capital", "x")...) },
		"a timeout that is none":      func(k *frameClient) { k.begin(1, message(0, nil), append(rangeMethod, "grpc-timeout", "soon")...) },
		"metadata that is not base64": func(k *frameClient) { k.begin(1, message(0, nil), append(rangeMethod, "x-bin", "%%%")...) },
		"an encoding that nobody knows": func(k *frameClient) {
			k.begin(1, message(1, []byte("x")), append(rangeMethod, "grpc-encoding", "rot13")...)
		},
		"compressed": func(k *frameClient) {
			k.begin(1, message(1, gzipped("\x0a\x01k")), append(rangeMethod, "grpc-encoding", "gzip", "grpc-accept-encoding", "gzip")...)
		},
		"compressed, and cut off": func(k *frameClient) {
			k.begin(1, message(1, gzipped("\x0a\x01k")[:20]), append(rangeMethod, "grpc-encoding", "gzip")...)
		},
		"compressed without an encoding": func(k *frameClient) { k.begin(1, message(1, []byte("x")), rangeMethod...) },
		"a flag that nobody knows":       func(k *frameClient) { k.begin(1, message(7, []byte("x")), rangeMethod...) },
		"a message that is cut off":      func(k *frameClient) { k.begin(1, message(0, []byte("1234"))[:7], rangeMethod...) },
		"a message of 4 GiB":             func(k *frameClient) { k.begin(1, []byte("\x00\xff\xff\xff\xffx"), rangeMethod...) },
		"no message":                     func(k *frameClient) { k.begin(1, []byte{}, rangeMethod...) },
		"two messages": func(k *frameClient) {
			k.begin(1, append(message(0, []byte("\x0a\x01k")), message(0, []byte("\x0a\x01k"))...), rangeMethod...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bare, proxy := greet(t, s.bare.Address), greet(t, s.proxy.Address)
			say(bare)
			say(proxy)
			etcd, got := bare.settled(), proxy.settled()
			want := func() []string {
				code, told := goAways[name]
				if !told {
					return etcd
				}
				if len(got) > 0 { // the text is for people
					got[0], _, _ = strings.Cut(got[0], ` "`)
				}
				return []string{"GOAWAY " + code.String(), "closed"}
			}
			// An answer to a call may come after that to the PING, and on one side later than on
			// the other.
			for begun := time.Now(); time.Since(begun) < 100*time.Millisecond || !slices.Equal(want(), got) && time.Since(begun) < 10*time.Second; {
				etcd, got = bare.listen(50*time.Millisecond), proxy.listen(50*time.Millisecond)
			}
			t.Logf("%q", got)
			if want := want(); !slices.Equal(want, got) {
				t.Errorf("\nbare etcd: %q\nwant:      %q\nthe proxy: %q", etcd, want, got)
			}
		})
	}
}

// noHTTP: who speaks another language is let go by both, each in its way.
func (s *site) noHTTP(t *testing.T) {
	for name, sent := range map[string]string{
		"a preface that goes wrong":    "PRI * HTTP/2.0\r\n\r\nNO\r\n\r\n",
		"a preface without settings":   http2.ClientPreface + "\x00\x00\x08\x06\x00\x00\x00\x00\x00the mark",
		"a preface and then zeros":     http2.ClientPreface + strings.Repeat("\x00", 100),
		"a preface and then TLS":       http2.ClientPreface + "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"TLS where there is none":      "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("x", 600),
		"SSH":                          "SSH-2.0-OpenSSH_9.9\r\n",
		"zeros":                        strings.Repeat("\x00", 100),
		"HTTP of a version to come":    "GET /health HTTP/9.9\r\n\r\n",
		"a request that is no request": "GET\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for side, address := range s.sides() {
				k := connect(t, address)
				k.raw(sent)
				// who waits for the end of a line waits no longer
				_ = k.Conn.(*net.TCPConn).CloseWrite()
				_ = k.SetReadDeadline(time.Now().Add(15 * time.Second))
				if _, err := io.Copy(io.Discard, k.Conn); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s keeps the connection", side)
				}
			}
		})
	}
}

package http2conn

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
)

// plain is a codec of gRPC for messages that are bytes.
type plain struct{}

var _ encoding.CodecV2 = plain{}

func (plain) Name() string { return "proto" }

func (plain) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (plain) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// bodies are sizes of messages, where the windows of both sides end among them.
var bodies = []int{0, 1, maxFrameSize - 5, maxFrameSize - 4, defaultWindow - 5, defaultWindow - 4, clientWindow - 5, clientWindow - 4, connWindow, 7 << 20}

// all runs call for each of bodies at once, twice.
func all(t *testing.T, call func(n int) ([]byte, error)) {
	t.Helper()
	var wg sync.WaitGroup
	for range 2 {
		for _, n := range bodies {
			wg.Go(func() {
				got, err := call(n)
				if err != nil {
					t.Errorf("%d bytes: %v", n, err)
					return
				}
				same(t, fmt.Sprint(n, " bytes"), got, pattern(n))
			})
		}
	}
	wg.Wait()
}

// whole is echo for clients that hear nothing before they have said all: it answers at the end, if
// the path says so.
func whole() *handler {
	h := echo()
	headers, data := h.headers, h.data
	asked := make(map[*Stream][]byte)
	h.headers = func(s *Stream, fields []hpack.HeaderField, end bool) {
		if slices.Contains(fields, hpack.HeaderField{Name: ":path", Value: "/s/whole"}) {
			asked[s] = []byte{}
		}
		headers(s, fields, end)
	}
	h.data = func(s *Stream, part []byte, end bool) {
		all, ok := asked[s]
		if !ok {
			data(s, part, end)
			return
		}
		asked[s] = append(all, part...)
		if s.Consumed(len(part)); end {
			s.Data(false, nil, asked[s])
			s.Headers(okTrailer, true)
			delete(asked, s)
		}
	}
	return h
}

// echoServer returns how to connect to a Conn that echoes.
func echoServer(t *testing.T) func() net.Conn {
	return func() net.Conn {
		near, far := loopback(t)
		h, pool := whole(), new(ledger)
		serving(t, h, pool, NewServer(far, Config{Handler: h, Pool: pool}))
		return near
	}
}

// TestClientOfGRPC calls a Conn with grpc-go: calls of one message, and a stream of many.
func TestClientOfGRPC(t *testing.T) {
	dial := echoServer(t)
	conn, err := grpc.NewClient("passthrough:///conn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dial(), nil }),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(plain{}), grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	all(t, func(n int) (got []byte, err error) {
		err = conn.Invoke(t.Context(), "/s/whole", pattern(n), &got)
		return got, err
	})
	s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/s/m")
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		for _, n := range bodies {
			if err := s.SendMsg(pattern(n)); err != nil {
				sent <- err
				return
			}
		}
		sent <- s.CloseSend()
	}()
	for _, n := range bodies {
		var got []byte
		if err := s.RecvMsg(&got); err != nil {
			t.Fatal(err)
		}
		same(t, "message", got, pattern(n))
	}
	if err := wait(t, sent, "end of sending"); err != nil {
		t.Fatal(err)
	}
	if err := s.RecvMsg(new([]byte)); err != io.EOF { //nolint:errorlint // grpc says so
		t.Errorf("at the end: %v", err)
	}
}

// onlyHTTP2 has net/http speak HTTP/2 without TLS, and nothing else.
func onlyHTTP2() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

// TestClientOfNetHTTP asks a Conn with net/http.
func TestClientOfNetHTTP(t *testing.T) {
	dial := echoServer(t)
	tr := &http.Transport{Protocols: onlyHTTP2(), DialContext: func(context.Context, string, string) (net.Conn, error) { return dial(), nil }}
	defer tr.CloseIdleConnections()
	all(t, func(n int) ([]byte, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://conn/s/m", bytes.NewReader(pattern(n)))
		if err != nil {
			return nil, err
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if v := resp.Trailer.Get("grpc-status"); v != "0" {
			return nil, fmt.Errorf("trailer %q", v)
		}
		return got, err
	})
}

// callAll calls a server, through a Conn to it.
func callAll(t *testing.T, conn net.Conn, head func(n int) []byte) {
	t.Helper()
	h, pool := caller(), new(ledger)
	serving(t, h, pool, NewClient(conn, Config{Handler: h, Pool: pool}))
	all(t, func(n int) ([]byte, error) {
		s, a := open(t, h.conn, false)
		s.Data(true, head(n), pattern(n))
		h.conn.Flush()
		select {
		case <-a.done:
		case <-t.Context().Done():
		}
		if len(a.trailer) != 1 && len(a.trailer) != 2 || a.trailer[0] != (hpack.HeaderField{Name: "grpc-status", Value: "0"}) {
			return nil, fmt.Errorf("trailer %v, code %v", a.trailer, a.code)
		}
		if got, ok := bytes.CutPrefix(a.body, head(n)); ok {
			return got, nil
		}
		return nil, fmt.Errorf("%d bytes that do not begin as they should", len(a.body))
	})
}

// serveLoopback serves on loopback until the test ends, and returns a connection to it.
func serveLoopback(t *testing.T, serve func(net.Listener) error, stop func()) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = serve(l) }()
	t.Cleanup(func() { stop(); wait(t, done, "end") })
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// TestServerOfGRPC is called by a Conn.
func TestServerOfGRPC(t *testing.T) {
	server := grpc.NewServer(grpc.ForceServerCodecV2(plain{}), grpc.MaxRecvMsgSize(1<<30), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		var msg []byte
		if err := s.RecvMsg(&msg); err != nil {
			return err
		}
		return s.SendMsg(msg)
	}))
	callAll(t, serveLoopback(t, server.Serve, server.Stop), func(n int) []byte { return []byte{0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)} })
}

// TestServerOfNetHTTP is asked by a Conn.
func TestServerOfNetHTTP(t *testing.T) {
	server := &http.Server{Protocols: onlyHTTP2(), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
		w.Header().Set("Grpc-Status", "0")
	})}
	callAll(t, serveLoopback(t, server.Serve, func() { server.Close() }), func(int) []byte { return nil })
}

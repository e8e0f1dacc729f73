package gateway

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// longestBody fills the budget of a bodyServer.
const longestBody = 65 << 20

// bodyServer serves bodies and websocket messages within a budget. Its handler only reads.
type bodyServer struct {
	budget *bodyBudget
	server *http.Server
	conns  oneByOne
	served chan error // how each body ended
}

func newBodyServer() *bodyServer {
	s := &bodyServer{budget: newBodyBudget(longestBody), conns: make(oneByOne), served: make(chan error, 3)}
	read := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		s.served <- err
	})
	s.server = &http.Server{Handler: s.budget.limit(newWebsockets(read, s.budget)), ReadHeaderTimeout: time.Minute}
	go func() { _ = s.server.Serve(s.conns) }()
	return s
}

// connect returns a connection to the server.
func (s *bodyServer) connect() net.Conn {
	near, far := net.Pipe()
	s.conns <- far
	return near
}

// post begins a request with a chunked body. Nobody waits for its parts to be read.
func (s *bodyServer) post(path, body string) net.Conn {
	conn := s.connect()
	go func() { _, _ = io.Copy(io.Discard, conn) }()
	_, _ = io.WriteString(conn, "POST "+path+" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
	go func() { _, _ = io.WriteString(conn, body) }()
	return conn
}

// close closes the connections and the server, and reports whether the budget is free again.
func (s *bodyServer) close(conns ...net.Conn) bool {
	for _, conn := range conns {
		conn.Close()
	}
	close(s.conns)
	_ = s.server.Close()
	synctest.Wait()
	return s.budget.room.TryAcquire(longestBody)
}

// chunk returns a part of a chunked body.
func chunk(data string) string {
	return "10000\r\n" + data + strings.Repeat("A", 64<<10-len(data)) + "\r\n"
}

// TestSlowBodiesMakeRoom: a body that stalls keeps its reservation as long as nobody waits for it.
// Then it is ended, and the other body is served.
func TestSlowBodiesMakeRoom(t *testing.T) {
	for name, stall := range map[string]func(t *testing.T, s *bodyServer) net.Conn{
		"a body":                     func(_ *testing.T, s *bodyServer) net.Conn { return s.post("/v3/kv/put", chunk("")) },
		"a value in a stream of any": func(_ *testing.T, s *bodyServer) net.Conn { return s.post("/v3/watch", chunk(`{} {"`)) },
		"a number":                   func(_ *testing.T, s *bodyServer) net.Conn { return s.post("/v3/watch", chunk(`1`)) },
		"a websocket message":        stallWebsocket,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newBodyServer()
				stalled := stall(t, s)
				time.Sleep(5 * reservationTime)
				synctest.Wait()
				if len(s.served) > 0 {
					t.Fatalf("a slow body is ended although nobody waits: %v", <-s.served)
				}
				begun := time.Now()
				other := s.post("/v3/kv/put", chunk("")+"0\r\n\r\n")
				if err := <-s.served; err != errBodyLate { //nolint:errorlint // it is this one
					t.Errorf("the slow body ends with %v", err)
				}
				if err := <-s.served; err != nil {
					t.Errorf("the other body: %v", err)
				}
				if took := time.Since(begun); took > reservationTime {
					t.Errorf("the other body took %v", took)
				}
				if !s.close(stalled, other) {
					t.Error("the budget is not free")
				}
			})
		})
	}
}

// stallWebsocket sends the front of a message, and expects that the websocket is closed with the
// code for it.
func stallWebsocket(t *testing.T, s *bodyServer) net.Conn {
	near := s.connect()
	dialer := websocket.Dialer{NetDial: func(string, string) (net.Conn, error) { return near, nil }}
	conn, _, err := dialer.DialContext(t.Context(), "ws://x/v3/watch", nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		if w, err := conn.NextWriter(websocket.TextMessage); err == nil {
			_, _ = io.WriteString(w, strings.Repeat("A", 64<<10))
		}
	}()
	go func() {
		if _, _, err := conn.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseTryAgainLater) {
			t.Errorf("the websocket ends with %v", err)
		}
	}()
	return near
}

// TestStreamsMakeRoom: a stream of values, such as the requests of a watch, reserves nothing
// between two of them, however long it has become.
func TestStreamsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newBodyServer()
		value := "10000\r\n{\"" + strings.Repeat("A", 64<<10-5) + "\"}\n\r\n"
		stream := s.post("/v3/watch", strings.Repeat(value, 3))
		synctest.Wait()
		begun := time.Now()
		other := s.post("/v3/kv/put", chunk("")+"0\r\n\r\n")
		if err := <-s.served; err != nil {
			t.Errorf("the other body: %v", err)
		}
		other.Close()
		time.Sleep(reservationTime + time.Second)
		_, _ = io.WriteString(stream, value+"0\r\n\r\n")
		if err := <-s.served; err != nil {
			t.Errorf("the stream ends with %v", err)
		}
		if took := time.Since(begun); took > reservationTime+time.Second {
			t.Errorf("they took %v", took)
		}
		if !s.close(stream) {
			t.Error("the budget is not free")
		}
	})
}

// oneByOne is a listener of the connections that it is sent.
type oneByOne chan net.Conn

// Accept implements net.Listener.
func (c oneByOne) Accept() (net.Conn, error) {
	if conn, ok := <-c; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

// Close implements net.Listener.
func (oneByOne) Close() error { return nil }

// Addr implements net.Listener.
func (oneByOne) Addr() net.Addr { return &net.UnixAddr{} }

package gateway

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestSlowBodiesMakeRoom: a body that stalls keeps its reservation as long as nobody waits for it.
// Then it is ended, and the other body is served.
func TestSlowBodiesMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const longest = 65 << 20 // fills the budget
		budget := newBodyBudget(longest)
		served := make(chan error, 2)
		server := &http.Server{Handler: budget.limit(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			_, err := io.Copy(io.Discard, r.Body)
			served <- err
		}))}
		conns := make(oneByOne)
		go func() { _ = server.Serve(conns) }()
		send := func(body string) net.Conn {
			near, far := net.Pipe()
			conns <- far
			go func() { _, _ = io.Copy(io.Discard, near) }()
			_, _ = io.WriteString(near, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
			go func() { _, _ = io.WriteString(near, body) }()
			return near
		}
		chunk := "10000\r\n" + strings.Repeat("A", 64<<10) + "\r\n"
		stalled := send(chunk)
		time.Sleep(5 * reservationTime)
		synctest.Wait()
		if len(served) > 0 {
			t.Fatalf("a slow body is ended although nobody waits: %v", <-served)
		}
		begun := time.Now()
		other := send(chunk + "0\r\n\r\n")
		if err := <-served; err != errBodyLate { //nolint:errorlint // it is this one
			t.Errorf("the slow body ends with %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("the other body: %v", err)
		}
		if took := time.Since(begun); took > reservationTime {
			t.Errorf("the other body took %v", took)
		}
		stalled.Close()
		other.Close()
		close(conns)
		_ = server.Close()
		synctest.Wait()
		if !budget.room.TryAcquire(longest) {
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

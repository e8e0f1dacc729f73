package harness

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// TestRelay uses an echo server over a link in each of its states.
func TestRelay(t *testing.T) {
	t.Parallel()
	e := New(t)
	echo, err := net.Listen("tcp", FreeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	received := make(chan string, 10)
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for lines := bufio.NewReader(c); ; {
					line, err := lines.ReadString('\n')
					if err != nil {
						return
					}
					received <- line
					_, _ = io.WriteString(c, line)
				}
			}()
		}
	}()
	r := e.StartRelay(echo.Addr().String())
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", r.Address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	send := func(c net.Conn, line string) {
		t.Helper()
		if _, err := io.WriteString(c, line); err != nil {
			t.Fatal(err)
		}
	}
	answers := func(c net.Conn, want string) {
		t.Helper()
		got := make([]byte, len(want))
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	silent := func(c net.Conn) {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%d bytes, %v, want silence", n, err)
		}
	}
	c := dial()
	send(c, "whole\n")
	answers(c, "whole\n")
	<-received

	r.Set(ResponsesFrozen)
	send(c, "responses frozen\n")
	if got := <-received; got != "responses frozen\n" {
		t.Errorf("the other side received %q", got)
	}
	silent(c)
	r.Set(Frozen)
	send(c, "frozen\n")
	silent(c)
	other := dial()
	send(other, "new\n")
	silent(other)
	if len(received) > 0 {
		t.Errorf("a frozen link let %q through", <-received)
	}
	r.Set(Whole)
	answers(c, "responses frozen\nfrozen\n")
	answers(other, "new\n")

	r.Set(Cut)
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a cut link: %v", err)
	}
	late, err := net.Dial("tcp", r.Address)
	if err == nil { // the reset may arrive a moment later
		defer late.Close()
		_ = late.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err = late.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a new connection over a cut link: %v", err)
	}
	r.Set(Whole)
	c = dial()
	send(c, "again\n")
	answers(c, "again\n")
}

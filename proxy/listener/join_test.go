package listener

import (
	"errors"
	"net"
	"slices"
	"testing"
)

// TestJoinedListener: every socket is accepted from, and Close ends a waiting Accept, all
// goroutines and later calls.
func TestJoinedListener(t *testing.T) {
	var sockets []net.Listener
	for range 3 {
		s, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		sockets = append(sockets, s)
	}
	l := joinListeners(sockets)
	if l.Addr() != sockets[0].Addr() {
		t.Errorf("the address is %v", l.Addr())
	}
	var want, got []string
	for _, s := range sockets {
		conn, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		want = append(want, conn.LocalAddr().String())
	}
	for range sockets {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, conn.RemoteAddr().String())
		_ = conn.Close()
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("accepted %v, want %v", got, want)
	}
	ended := make(chan error)
	go func() {
		_, err := l.Accept()
		ended <- err
	}()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a waiting Accept ends with %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a later Accept ends with %v", err)
	}
	for _, s := range sockets {
		if _, err := net.Dial("tcp", s.Addr().String()); err == nil {
			t.Error("a socket is open after Close")
		}
	}
	// one that was never accepted from
	if err := joinListeners([]net.Listener{l, l}).Close(); err != nil {
		t.Error(err)
	}
}

// signallingSocket tells of each connection that was accepted.
type signallingSocket struct {
	net.Listener
	accepted chan struct{}
}

func (s signallingSocket) Accept() (net.Conn, error) {
	conn, err := s.Listener.Accept()
	if err == nil {
		s.accepted <- struct{}{}
	}
	return conn, err
}

// TestJoinedListenerCloses: what a socket has accepted before Close is returned after it.
func TestJoinedListenerCloses(t *testing.T) {
	accepted := make(chan struct{}, 2)
	var sockets []net.Listener
	for range 2 {
		s, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		sockets = append(sockets, signallingSocket{s, accepted})
	}
	l := joinListeners(sockets)
	for _, s := range sockets {
		conn, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	<-accepted
	<-accepted
	closed := make(chan error, 1)
	go func() { closed <- l.Close() }()
	<-l.(*joinedListener).closing
	second, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("an Accept after the last connection ends with %v", err)
	}
}

package listener

import (
	"context"
	"io"
	"log/slog"
	"net"
	"slices"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
)

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

// TestSockets: every socket is accepted from. Close closes them all, and what they accepted before
// is served after it.
func TestSockets(t *testing.T) {
	accepted := make(chan struct{}, 3)
	var sockets []net.Listener
	for range 3 {
		s, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		sockets = append(sockets, signallingSocket{s, accepted})
	}
	log := slog.New(slog.DiscardHandler)
	m, err := metrics.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(Config{Address: "systemd://etcd", Sockets: sockets}, log, m)
	if err != nil {
		t.Fatal(err)
	}
	if l.Addr() != sockets[0].Addr() {
		t.Errorf("the address is %v", l.Addr())
	}
	served, ended := make(chan string, 3), make(chan struct{})
	go func() {
		defer close(ended)
		l.Run(context.Background(), func(conn *Conn) {
			served <- conn.RemoteAddr().String()
			_ = conn.Close()
		})
	}()
	var conns []net.Conn
	for _, s := range sockets {
		conn, err := net.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		<-accepted
		conns = append(conns, conn)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	var want, got []string
	for _, conn := range conns {
		want = append(want, conn.LocalAddr().String())
		if _, err := io.WriteString(conn, "GET"); err != nil {
			t.Error(err)
		}
		got = append(got, <-served)
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("served %v, want %v", got, want)
	}
	<-ended
	for _, s := range sockets {
		if _, err := net.Dial("tcp", s.Addr().String()); err == nil {
			t.Error("a socket is open after Close")
		}
	}
}

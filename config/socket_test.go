package config

import (
	"net"
	"testing"
)

// TestCheckSocket: a socket that systemd passes has the same policy as an address in the file.
func TestCheckSocket(t *testing.T) {
	plain, server, mutual := Listener{}, Listener{TLS: &ListenerTLS{}}, Listener{TLS: &ListenerTLS{ClientCAFile: "ca"}}
	insecure := Listener{InsecurePlaintext: true}
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 2379} }
	for _, tt := range []struct {
		name string
		l    Listener
		addr net.Addr
		path string // of the problem; empty: there is none
	}{
		{"unix", plain, &net.UnixAddr{Name: "/run/a", Net: "unix"}, ""},
		{"loopback", plain, tcp("127.0.0.1"), ""},
		{"loopback, IPv6", plain, tcp("::1"), ""},
		{"any, plain", plain, tcp("::"), "l"},
		{"any IPv4, plain", plain, tcp("0.0.0.0"), "l"},
		{"one address, TLS without client certificates", server, tcp("10.0.0.1"), "l.tls.clientCAFile"},
		{"one address, TLS", mutual, tcp("10.0.0.1"), ""},
		{"insecure", insecure, tcp("10.0.0.1"), ""},
	} {
		p := tt.l.CheckSocket("l", tt.addr)
		if (p == nil) != (tt.path == "") || p != nil && (p.Path != tt.path || p.Text == "" || p.Hint == "") {
			t.Errorf("%s: got %+v, want a problem at %q", tt.name, p, tt.path)
		}
	}
}

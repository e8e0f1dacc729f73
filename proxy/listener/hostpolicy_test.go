package listener

import (
	"log/slog"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// TestHostOfCertificate: the names of the listener's certificate are its own, those of the moment.
func TestHostOfCertificate(t *testing.T) {
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server", "etcd.example", "*.wild.example")
	files, err := (&TLS{CertFile: cert, KeyFile: key}).serverTLS(slog.New(slog.DiscardHandler), "here")
	if err != nil {
		t.Fatal(err)
	}
	p := newHostPolicy(Config{Address: "listen.example:2379"}, files)
	for host, want := range map[string]bool{
		"etcd.example": true, "ETCD.example.:2379": true, "a.wild.example": true, "a.b.wild.example": false, "wild.example": false, "server": false, "listen.example:1": true, "": true, ":2379": false, "other.example": false,
	} {
		if got := p.Allows(host); got != want {
			t.Errorf("%q: %t", host, got)
		}
	}
	ca.Issue("server", "server", "renewed.example")
	if p.Allows("etcd.example") || !p.Allows("renewed.example") {
		t.Error("the names are not those of the new certificate")
	}
}

package listener

import (
	"context"
	"crypto/x509"
	"log/slog"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/logonce"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// Identity says who is at the other end of a connection. It is made once, when the connection is
// accepted, and never changes: a connection whose client would be treated in another way ends.
type Identity struct {
	Listener string // the address of the listener, as configured
	Remote   string // the peer's address; empty for a unix socket
	// CommonName and Names (DNS names, IP addresses, e-mail addresses and URIs) come from the
	// client's verified certificate. Both are empty for a client without one.
	CommonName string
	Names      []string
	// Ciphertext: this client is given stored bytes, and may only read.
	Ciphertext bool
	// Denied: this client may do nothing.
	Denied bool

	Upstream            *upstream.Cluster // where the listener leads to
	AdvertiseClientURLs []string          // its URLs
	HostPolicy          *HostPolicy       // which HTTP requests it takes; nil within the process
}

// ReadOnly reports whether a client may only read: it is given stored bytes, for backups and
// mirrors.
func (id *Identity) ReadOnly() bool { return id.Ciphertext }

// Name is how logs call the client.
func (id *Identity) Name() string {
	switch {
	case id.CommonName != "":
		return id.CommonName
	case len(id.Names) > 0:
		return id.Names[0]
	}
	return "(no certificate)"
}

// identify fills id from the leaf of a verified chain.
func (id *Identity) identify(cert *x509.Certificate) {
	id.CommonName = cert.Subject.CommonName
	id.Names = append(id.Names, cert.DNSNames...)
	for _, ip := range cert.IPAddresses {
		id.Names = append(id.Names, ip.String())
	}
	id.Names = append(id.Names, cert.EmailAddresses...)
	for _, u := range cert.URIs {
		id.Names = append(id.Names, u.String())
	}
}

// authorise applies a listener's lists; nil are empty ones. A client that is in both gets
// stored bytes. With an empty list of allowed clients any certificate of the CA may enter.
func (id *Identity) authorise(lists *clientLists) {
	if lists == nil {
		lists = &clientLists{}
	}
	id.Ciphertext = id.in(lists.ciphertext)
	id.Denied = len(lists.allowed) > 0 && !id.Ciphertext && !id.in(lists.allowed)
}

func (id *Identity) in(list map[string]bool) bool {
	return id.CommonName != "" && list[id.CommonName] || slices.ContainsFunc(id.Names, func(name string) bool { return list[name] })
}

// Denials logs and tells each denied client once, however often it comes back.
type Denials struct {
	log    *slog.Logger
	tell   func(listener, client, remote string) // may be nil
	logged *logonce.Keys
}

// rememberedKeys is how many keys of repeated log messages are remembered: clients choose them.
const rememberedKeys = 1024

// NewDenials makes one. tell may be nil.
func NewDenials(log *slog.Logger, tell func(listener, client, remote string)) *Denials {
	return &Denials{log: log, tell: tell, logged: logonce.NewKeys(rememberedKeys)}
}

// Note logs and reports a denied client, unless that was done before.
func (d *Denials) Note(id *Identity) {
	if !d.logged.First(id.Listener + "\x00" + id.Name()) {
		return
	}
	d.log.Warn("client denied: it is not in the listener's allowedClients",
		"listener", id.Listener, "client", id.Name(), "names", id.Names, "remote", id.Remote)
	if d.tell != nil {
		d.tell(id.Listener, id.Name(), id.Remote)
	}
}

// identityKey is of the context of a web request: the identity of the client's connection.
type identityKey struct{}

// IdentityOf returns the identity of the client that has sent a web request, and nil if there is
// none.
func IdentityOf(ctx context.Context) *Identity {
	id, _ := ctx.Value(identityKey{}).(*Identity)
	return id
}

// WithIdentity returns the context of web requests of a client.
func WithIdentity(ctx context.Context, id *Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

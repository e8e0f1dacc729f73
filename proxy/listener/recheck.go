package listener

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
)

// recheckInterval is how soon after a change of a listener's files or of the time the open
// connections are checked again.
const recheckInterval = time.Second

// clientLists are a listener's lists of client names.
type clientLists struct{ allowed, ciphertext map[string]bool }

func newClientLists(allowed, ciphertext []string) *clientLists {
	return &clientLists{allowed: set(allowed), ciphertext: set(ciphertext)}
}

// criteria are what a client is admitted by: the TLS files and the lists of a moment. They are
// compared by their pointers.
type criteria struct {
	files *tls.Config
	lists *clientLists
}

// connSet keeps account of a listener's connections with client certificates, to end those whose
// client would not be admitted any more.
type connSet struct {
	mu      sync.Mutex
	all     map[*Conn]struct{}
	expires time.Time // the first of theirs; zero if there is none

	checking sync.Mutex // held by who checks all of them; taken before mu
	checked  criteria   // by these; under checking
}

// criteria returns those of the moment.
func (l *Listener) criteria() criteria {
	now := criteria{lists: l.lists.Load()}
	if l.TLS != nil {
		now.files = l.TLS.Get()
	}
	return now
}

// admit notes an identified connection, unless its client would not be admitted any more. The
// connection was identified by the criteria in by.
func (l *Listener) admit(c *Conn, by criteria) error {
	if len(c.certs) == 0 {
		return nil
	}
	l.conns.mu.Lock()
	if l.conns.all == nil {
		l.conns.all = make(map[*Conn]struct{})
	}
	l.conns.all[c] = struct{}{}
	if l.conns.expires.IsZero() || c.expires.Before(l.conns.expires) {
		l.conns.expires = c.expires
	}
	l.conns.mu.Unlock()
	// The criteria may have changed since the handshake, before recheck could see this connection.
	now := l.criteria()
	if now == by {
		return nil
	}
	_, err := now.admits(c, time.Now())
	if err != nil {
		l.forget(c)
	}
	return err
}

func (l *Listener) forget(c *Conn) {
	l.conns.mu.Lock()
	defer l.conns.mu.Unlock()
	delete(l.conns.all, c)
}

// errOtherLists says that a client is treated in another way than when its connection was made.
var errOtherLists = errors.New("allowedClients or ciphertextClients have changed for it")

// admits reports whether the client of a connection would be admitted as it was, and until when its
// certificate is valid.
func (now criteria) admits(c *Conn, at time.Time) (until time.Time, err error) {
	intermediates := x509.NewCertPool()
	for _, cert := range c.certs[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := c.certs[0].Verify(x509.VerifyOptions{
		Roots: now.files.ClientCAs, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("verify client certificate: %w", err)
	}
	if now.files.VerifyConnection != nil {
		if err := now.files.VerifyConnection(tls.ConnectionState{PeerCertificates: c.certs, VerifiedChains: chains}); err != nil {
			return time.Time{}, err
		}
	}
	id := *c.Identity
	if id.authorise(now.lists); id.Denied != c.Identity.Denied || id.Ciphertext != c.Identity.Ciphertext {
		return time.Time{}, errOtherLists
	}
	return validUntil(chains), nil
}

// validUntil is when the last of the chains ceases to be valid.
func validUntil(chains [][]*x509.Certificate) (until time.Time) {
	for _, chain := range chains {
		end := chain[0].NotAfter
		for _, cert := range chain {
			if cert.NotAfter.Before(end) {
				end = cert.NotAfter
			}
		}
		if end.After(until) {
			until = end
		}
	}
	return until
}

// RecheckUntil checks the open connections again whenever the criteria have changed or a
// certificate has expired, until ctx ends.
func (l *Listener) RecheckUntil(ctx context.Context) {
	if l.TLS == nil || l.Config.TLS.ClientCAFile == "" {
		return
	}
	ticker := time.NewTicker(recheckInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case at := <-ticker.C:
			l.recheck(at)
		}
	}
}

// recheck ends the connections whose client would not be admitted any more. A connection is ended
// at once: its calls are the client's to repeat, if it is let in.
func (l *Listener) recheck(at time.Time) {
	l.conns.checking.Lock()
	defer l.conns.checking.Unlock()
	now := l.criteria()
	conns := l.due(now, at)
	if conns == nil {
		return
	}
	type verdict struct {
		until time.Time
		err   error
	}
	seen := make(map[string]verdict) // by certificates: clients have many connections
	ended := make(map[[2]string]int) // by client and reason
	var first time.Time
	for _, c := range conns {
		fingerprint := c.fingerprint()
		v, ok := seen[fingerprint]
		if !ok {
			v.until, v.err = now.admits(c, at)
			seen[fingerprint] = v
		}
		if v.err == nil {
			if first.IsZero() || v.until.Before(first) {
				first = v.until
			}
			continue
		}
		l.forget(c)
		// the connection below TLS: to send close_notify may block. The engine or the gateway gets
		// an error from its next read
		_ = c.WriteBuffer.Close()
		reason := metrics.EndedCertificate
		if errors.Is(v.err, errOtherLists) {
			reason = metrics.EndedLists
		}
		l.metrics.EndedConnections.WithLabelValues(l.Config.Address, reason).Inc()
		ended[[2]string{c.Identity.Name(), v.err.Error()}]++
	}
	l.conns.mu.Lock()
	// others may have arrived
	if !first.IsZero() && (l.conns.expires.IsZero() || first.Before(l.conns.expires)) {
		l.conns.expires = first
	}
	l.conns.mu.Unlock()
	for clientAndReason, n := range ended {
		l.log.Warn("connections ended: the client would not be admitted as it was any more", "listener", l.Config.Address, "client", clientAndReason[0], "connections", n, "because", clientAndReason[1])
	}
}

// due returns the connections to check, nil if nothing has changed. The caller holds
// conns.checking.
func (l *Listener) due(now criteria, at time.Time) []*Conn {
	l.conns.mu.Lock()
	defer l.conns.mu.Unlock()
	expired := !l.conns.expires.IsZero() && at.After(l.conns.expires)
	if now == l.conns.checked && !expired {
		return nil
	}
	l.conns.checked, l.conns.expires = now, time.Time{}
	conns := make([]*Conn, 0, len(l.conns.all))
	for c := range l.conns.all {
		conns = append(conns, c)
	}
	return conns
}

// fingerprint is the same for connections that are judged the same.
func (c *Conn) fingerprint() string {
	var b strings.Builder
	for _, cert := range c.certs {
		b.Write(cert.Raw)
	}
	fmt.Fprintf(&b, "%t %t", c.Identity.Denied, c.Identity.Ciphertext)
	return b.String()
}

// checkLists reports lists that need client certificates where there are none.
func (c Config) checkLists(allowed, ciphertext []string) error {
	if len(allowed)+len(ciphertext) > 0 && (c.TLS == nil || c.TLS.ClientCAFile == "") {
		return fmt.Errorf("listener %s: allowedClients and ciphertextClients need TLS with clientCAFile", c.Address)
	}
	return nil
}

// SetClients puts lists in place of AllowedClients and CiphertextClients, and ends the connections
// of clients that these treat differently. After an error the old ones stay.
func (l *Listener) SetClients(allowed, ciphertext []string) error {
	if err := l.Config.checkLists(allowed, ciphertext); err != nil {
		return err
	}
	l.lists.Store(newClientLists(allowed, ciphertext))
	if l.TLS != nil {
		l.recheck(time.Now())
	}
	return nil
}

package kubeadm

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// A balancer is the load balancer of a control plane: it passes TCP connections on to API servers
// that are ready, and closes those of an API server that is no longer ready, as load balancers do.
type balancer struct {
	mu       sync.Mutex
	backends []*backend
	next     int
}

// backend is an API server.
type backend struct {
	address string
	ready   bool
	open    map[net.Conn]bool
}

// newBalancer starts a load balancer at address, which ends with the test.
func newBalancer(t *testing.T, address string) *balancer {
	t.Helper()
	b := new(balancer)
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { b.serve(conn) })
		}
	})
	running.Go(func() { b.check(ctx) })
	t.Cleanup(func() {
		stop()
		l.Close()
		b.mu.Lock()
		for _, s := range b.backends {
			s.closeAll()
		}
		b.mu.Unlock()
		running.Wait()
	})
	return b
}

// add adds an API server.
func (b *balancer) add(address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.backends = append(b.backends, &backend{address: address, open: make(map[net.Conn]bool)})
}

// check asks each API server every half second whether it is ready.
func (b *balancer) check(ctx context.Context) {
	client := &http.Client{
		Timeout: 2 * time.Second,
		// as load balancers do
		Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
	}
	for {
		b.mu.Lock()
		all := append([]*backend(nil), b.backends...)
		b.mu.Unlock()
		var checks sync.WaitGroup
		for _, s := range all {
			checks.Go(func() {
				res, err := client.Get("https://" + s.address + "/readyz")
				ready := err == nil && res.StatusCode == http.StatusOK
				if err == nil {
					res.Body.Close()
				}
				b.mu.Lock()
				if s.ready = ready; !ready {
					s.closeAll()
				}
				b.mu.Unlock()
			})
		}
		checks.Wait()
		select {
		case <-ctx.Done():
			return
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (s *backend) closeAll() {
	for conn := range s.open {
		conn.Close()
	}
}

// pick returns a connection to the next API server that is ready.
func (b *balancer) pick() (*backend, net.Conn) {
	b.mu.Lock()
	var candidates []*backend
	for i := range b.backends {
		if s := b.backends[(b.next+i)%len(b.backends)]; s.ready {
			candidates = append(candidates, s)
		}
	}
	b.next++
	b.mu.Unlock()
	for _, s := range candidates {
		if conn, err := net.DialTimeout("tcp", s.address, time.Second); err == nil {
			b.mu.Lock()
			s.open[conn] = true
			b.mu.Unlock()
			return s, conn
		}
	}
	return nil, nil
}

func (b *balancer) serve(down net.Conn) {
	defer down.Close()
	s, up := b.pick()
	if s == nil {
		return
	}
	ended := make(chan struct{}, 2)
	for _, pair := range [][2]net.Conn{{down, up}, {up, down}} {
		go func() {
			_, _ = io.Copy(pair[0], pair[1])
			ended <- struct{}{}
		}()
	}
	<-ended
	down.Close()
	up.Close()
	<-ended
	b.mu.Lock()
	delete(s.open, up)
	b.mu.Unlock()
}

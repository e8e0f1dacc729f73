package relay

import (
	"slices"
	"sync"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// maxDenied is how many connections of clients that are not allowed the engine serves at a time.
// The sockets of further ones are detached, the oldest first: see [http2conn.Conn.Detach]. Their
// requests are refused by etcdapi.API.Authorize.
const maxDenied = 64

// deniedConns are the connections of clients that are not allowed.
type deniedConns struct {
	mu       sync.Mutex
	served   []*session // the oldest first
	detached map[*http2conn.Detached]struct{}
	ended    bool
}

// add notes a new session.
func (d *deniedConns) add(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.served) == maxDenied {
		d.served[0].client.Detach()
		d.served = slices.Delete(d.served, 0, 1)
	}
	d.served = append(d.served, s)
}

// remove forgets a session that has ended.
func (d *deniedConns) remove(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.served = slices.DeleteFunc(d.served, func(other *session) bool { return other == s })
}

// wait waits until a detached socket is closed.
func (d *deniedConns) wait(socket *http2conn.Detached) {
	d.mu.Lock()
	if d.detached == nil {
		d.detached = make(map[*http2conn.Detached]struct{})
	}
	d.detached[socket] = struct{}{}
	if d.ended {
		socket.End()
	}
	d.mu.Unlock()
	socket.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.detached, socket)
}

// end ends all detached sockets, also those to come.
func (d *deniedConns) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended = true
	for socket := range d.detached {
		socket.End()
	}
}

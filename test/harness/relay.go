package harness

import (
	"errors"
	"net"
	"sync"
)

// Link is what a [Relay] does with the bytes that it gets.
type Link int

// The states of a link.
const (
	Whole Link = iota // all bytes are forwarded
	Cut               // every connection is reset, including new ones
	// Frozen: no bytes are forwarded and none are lost: they are held back until the link is whole
	// again
	Frozen
	// ResponsesFrozen is like Frozen, but only for responses: requests are forwarded
	ResponsesFrozen
)

// Relay is a network between two processes: it listens in the place of one of them, and copies
// bytes. It is safe for concurrent use.
type Relay struct {
	// Address is host:port, URL the same with its scheme.
	Address, URL string

	to       string
	listener net.Listener
	all      sync.WaitGroup
	mu       sync.Mutex
	changed  *sync.Cond
	link     Link
	ended    bool
	conns    map[*net.TCPConn]bool
	capture  *Capture
}

// StartRelay starts a relay to an address, which need not be in use yet. The link is whole.
func (e *Env) StartRelay(to string) *Relay {
	e.TB.Helper()
	r := &Relay{Address: FreeAddress(e.TB), to: to, conns: make(map[*net.TCPConn]bool)}
	r.URL, r.changed = "http://"+r.Address, sync.NewCond(&r.mu)
	var err error
	if r.listener, err = net.Listen("tcp", r.Address); err != nil {
		e.TB.Fatalf("start relay: %v", err)
	}
	r.all.Go(r.serve)
	e.TB.Cleanup(r.end)
	return r
}

// Set changes the state of the link.
func (r *Relay) Set(link Link) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.link = link
	if link == Cut {
		r.reset()
	}
	r.changed.Broadcast()
}

// Capture searches everything that the relay gets from now on, in both directions.
func (r *Relay) Capture(c *Capture) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.capture = c
}

func (r *Relay) captured() *Capture {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.capture
}

// reset ends every connection so that both sides notice it at once. Held-back bytes are lost.
func (r *Relay) reset() {
	for c := range r.conns {
		_ = c.SetLinger(0) // otherwise it would be an orderly end
		c.Close()
	}
}

func (r *Relay) end() {
	r.mu.Lock()
	r.ended = true
	r.listener.Close()
	r.reset()
	r.changed.Broadcast()
	r.mu.Unlock()
	r.all.Wait()
}

func (r *Relay) serve() {
	for {
		down, err := r.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			r.all.Go(func() { r.join(down.(*net.TCPConn)) })
		}
	}
}

// join copies between a connection and a new one to the other side, until one of them ends.
func (r *Relay) join(down *net.TCPConn) {
	defer r.drop(down)
	if !r.keep(down) {
		return
	}
	conn, err := net.Dial("tcp", r.to)
	if err != nil {
		_ = down.SetLinger(0)
		return
	}
	up := conn.(*net.TCPConn)
	defer r.drop(up)
	if !r.keep(up) {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { r.copy(up, down, false) })
	both.Go(func() { r.copy(down, up, true) })
	both.Wait()
}

// copy closes both connections when one of them ends: neither gRPC nor etcd's peers use half-closed
// connections.
func (r *Relay) copy(to, from *net.TCPConn, back bool) {
	defer to.Close()
	defer from.Close()
	var rest []byte // of what was searched
	for buffer := make([]byte, 32<<10); ; {
		n, err := from.Read(buffer)
		if c := r.captured(); c != nil {
			rest = c.search(from.RemoteAddr().String()+" to "+to.RemoteAddr().String(), rest, buffer[:n])
		}
		r.wait(back) // also before an end is forwarded
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// wait returns when bytes may be forwarded in a direction.
func (r *Relay) wait(back bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for !r.ended && (r.link == Frozen || r.link == ResponsesFrozen && back) {
		r.changed.Wait()
	}
}

// keep registers a connection to be reset. It reports whether connections are allowed.
func (r *Relay) keep(c *net.TCPConn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended || r.link == Cut {
		_ = c.SetLinger(0)
		return false
	}
	r.conns[c] = true
	return true
}

func (r *Relay) drop(c *net.TCPConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
	c.Close()
}

package proxy

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/net/http2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// TestReusedStreams: frames for a call act on no later call, although calls use the same memory. A
// client cancels some of its calls while etcd responds, opens windows of calls that have ended, and
// half-closes others late. Each call that it does not cancel gets its own response.
func TestReusedStreams(t *testing.T) {
	r := startRelaying(t, serveFrames(t, nil), nil, nil, true)
	c := newFrameClient(t, r.Addrs()[0].String(), "/etcdserverpb.KV/Range", nil)
	requestOf := func(id uint32) []byte {
		message := binary.BigEndian.AppendUint32([]byte{0x0a, 4}, id)
		return append(rpc.Header(len(message)), message...)
	}
	var mu sync.Mutex
	open := make(map[uint32]int) // responses to each call that was neither canceled nor ended
	c.handle = func(f frame) {
		mu.Lock()
		defer mu.Unlock()
		responses, isOpen := open[f.id]
		switch {
		case !isOpen:
		case f.kind == http2.FrameRSTStream:
			t.Errorf("stream %d was reset", f.id)
			delete(open, f.id)
		case f.kind == http2.FrameData:
			if !bytes.Equal(f.payload, requestOf(f.id)) {
				t.Errorf("the response on stream %d is that of another call: %x", f.id, f.payload)
			}
			open[f.id]++
		case f.ends():
			if responses != 1 {
				t.Errorf("%d responses on stream %d", responses, f.id)
			}
			if delete(open, f.id); len(open) == 0 {
				select {
				case c.done <- struct{}{}:
				default:
				}
			}
		}
	}
	c.start(t)
	random := rand.New(rand.NewPCG(1, 2))
	rounds := 2000
	if testing.Short() {
		rounds = 200
	}
	const batch, writes = 8, 4
	reset := []byte{0, 0, 0, byte(http2.ErrCodeCancel)}
	canceled := 0
	for range rounds {
		for write := range writes + 1 {
			c.calls = c.calls[:0]
			mu.Lock()
			for range 2 { // calls of the last write, which etcd responds to now
				id := c.id - 2*random.Uint32N(batch)
				if write == 0 || c.id < 2*batch {
					break
				}
				if _, isOpen := open[id]; isOpen {
					delete(open, id)
					canceled++
				}
				c.calls = appendFrame(c.calls, http2.FrameRSTStream, 0, id, reset)
			}
			for i := range batch {
				if write == writes && i > 0 { // a call that nothing follows
					break
				}
				block := c.nextHeader()
				open[c.id] = 0
				c.calls = appendFrame(c.calls, http2.FrameHeaders, http2.FlagHeadersEndHeaders, c.id, block)
				if i%4 != 0 {
					c.calls = appendFrame(c.calls, http2.FrameData, http2.FlagDataEndStream, c.id, requestOf(c.id))
				} else {
					c.calls = appendFrame(c.calls, http2.FrameData, 0, c.id, requestOf(c.id))
					c.calls = appendFrame(c.calls, http2.FrameData, http2.FlagDataEndStream, c.id)
				}
				if earlier := c.id - 2*random.Uint32N(min(c.id/2+1, 4*batch)); i%2 == 0 {
					c.calls = appendFrame(c.calls, http2.FrameWindowUpdate, 0, earlier, []byte{0, 0, 0, 1})
				}
			}
			mu.Unlock()
			if _, err := c.conn.Write(c.calls); err != nil {
				t.Fatal(err)
			}
		}
		for {
			mu.Lock()
			n := len(open)
			mu.Unlock()
			if n == 0 {
				break
			}
			select {
			case <-c.done:
			case <-c.served:
				t.Fatal("the proxy has closed the connection")
			}
		}
		if t.Failed() {
			return
		}
	}
	if canceled < rounds {
		t.Errorf("only %d calls were canceled before they ended", canceled)
	}
}

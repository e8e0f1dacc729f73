package http2conn

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
)

// stingyPeer is a peer that gives its windows in odd pieces, and knows what it has given.
type stingyPeer struct {
	*peer
	rand  *rand.Rand
	h     *handler
	all   []*Stream
	sizes []int // of what was sent on them
	given []int // on them
	conn  int   // on the connection
}

// TestMiserlyPeer: of a peer nothing is taken that it has not given, and all streams come to their
// ends, whole.
func TestMiserlyPeer(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			m := &stingyPeer{rand: rand.New(rand.NewPCG(seed, 0)), h: &handler{vectors: seed%2 == 0}, conn: defaultWindow}
			initial := m.rand.IntN(3) * m.rand.IntN(20_000)
			m.peer = serveOne(t, m.h, Config{}, windowOf(uint32(initial)))
			for id := uint32(1); id < 12; id += 2 {
				m.all = append(m.all, m.begin(t, m.h, id, true))
				m.sizes, m.given = append(m.sizes, 0), append(m.given, initial)
			}
			for range 100 {
				m.send()
				m.give(t)
			}
			for _, i := range m.rand.Perm(len(m.all)) {
				m.all[i].Headers(okTrailer, true)
			}
			m.h.conn.Flush()
			for range 10_000 {
				if m.give(t); len(m.h.conn.Streams()) == 0 {
					break
				}
			}
			if n := len(m.h.conn.Streams()); n > 0 {
				t.Errorf("seed %d: %d streams are left", seed, n)
			}
			for i, n := range m.sizes {
				same(t, fmt.Sprint("seed ", seed, ", stream ", i), m.took(uint32(2*i+1)), pattern(n))
			}
		})
	}
}

// send sends something on one of the streams.
func (m *stingyPeer) send() {
	i, n := m.rand.IntN(len(m.all)), m.rand.IntN(20_000)
	part := pattern(m.sizes[i] + n)[m.sizes[i]:]
	m.sizes[i] += n
	if m.rand.IntN(2) == 0 {
		m.all[i].Data(false, part[:n/2], part[n/2:])
		return
	}
	size := 2000 + m.rand.IntN(8000) // more than grpc/mem lets go
	b := m.pool.Get(size)
	copy(*b, pattern(m.sizes[i] + size)[m.sizes[i]:])
	m.sizes[i] += size
	m.all[i].Buffers(false, part, bufferOf(b, m.pool))
}

// give opens one of the windows a little, and looks whether more was taken than was given.
func (m *stingyPeer) give(t *testing.T) {
	t.Helper()
	n := 1 + m.rand.IntN(20_000)
	if i := m.rand.IntN(len(m.all) + 1); i < len(m.all) {
		m.given[i] += n
		m.WriteWindowUpdate(uint32(2*i+1), uint32(n))
	} else {
		n *= len(m.all)
		m.conn += n
		m.WriteWindowUpdate(0, uint32(n))
	}
	m.says(t)
	sum := 0
	for i, most := range m.given {
		n := m.brought(uint32(2*i + 1))
		if sum += n; n > most {
			t.Fatalf("stream %d was sent %d bytes, and takes %d", i, n, most)
		}
	}
	if sum > m.conn {
		t.Fatalf("%d bytes were sent, and the connection takes %d", sum, m.conn)
	}
}

package http2conn

import "google.golang.org/grpc/mem"

// minApart is from what length on bytes are written from where they are, and not copied.
const minApart = 4 << 10

// aparts are bytes that belong between others that were gathered.
type aparts struct {
	all  []apart
	size int
}

type apart struct {
	at   int // so many gathered bytes come before
	data []byte
	of   mem.Buffer // which data is of; it is held
}

func (a *aparts) free() {
	for _, p := range a.all {
		p.of.Free()
	}
	*a = aparts{}
}

// appendOf gathers b, which is of a buffer.
func (c *Conn) appendOf(of mem.Buffer, b []byte) {
	if !c.cfg.Plaintext || len(b) < minApart {
		c.append(b)
		return
	}
	of.Ref()
	c.apart.all = append(c.apart.all, apart{at: len(*c.out), data: b, of: of}) // the head of its frame is there
	c.apart.size += len(b)
}

// writeOut writes what was gathered.
func (c *Conn) writeOut(out []byte, apart aparts) error {
	switch {
	case !c.cfg.Plaintext:
		_, err := c.conn.Write(out)
		return err
	case len(apart.all) == 0:
		_, err := c.outlet.Write(out)
		return err
	}
	vectors := make([][]byte, 0, 2*len(apart.all)+1)
	at := 0
	for _, p := range apart.all {
		vectors = append(vectors, out[at:p.at], p.data)
		at = p.at
	}
	return c.outlet.writeAll(append(vectors, out[at:]))
}

package http2conn

import "google.golang.org/grpc/mem"

// minExternal is the length from which data is written from its own buffer, without a copy.
const minExternal = 4 << 10

// externalChunks are data that is written between the bytes of the pending buffer.
type externalChunks struct {
	all  []externalChunk
	size int
}

type externalChunk struct {
	at   int // this many pending bytes are written before
	data []byte
	of   mem.Buffer // that data is a part of; the chunk holds a reference
}

func (e *externalChunks) free() {
	for _, chunk := range e.all {
		chunk.of.Free()
	}
	*e = externalChunks{}
}

// appendBuffer appends b, a part of a buffer, to what is to be written. The frame header is
// pending.
func (c *Conn) appendBuffer(of mem.Buffer, b []byte) {
	if !c.cfg.Plaintext || len(b) < minExternal {
		c.append(b)
		return
	}
	of.Ref()
	c.external.all = append(c.external.all, externalChunk{at: len(*c.pending), data: b, of: of})
	c.external.size += len(b)
}

// writeOut writes pending bytes, with the external chunks between them.
func (c *Conn) writeOut(pending []byte, external externalChunks) error {
	switch {
	case !c.cfg.Plaintext:
		_, err := c.conn.Write(pending)
		return err
	case len(external.all) == 0:
		_, err := c.writeBuffer.Write(pending)
		return err
	}
	vectors := make([][]byte, 0, 2*len(external.all)+1)
	at := 0
	for _, chunk := range external.all {
		vectors = append(vectors, pending[at:chunk.at], chunk.data)
		at = chunk.at
	}
	return c.writeBuffer.writeAll(append(vectors, pending[at:]))
}

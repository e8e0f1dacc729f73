package http2conn

import (
	"net"

	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

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
func (o *output) appendBuffer(of mem.Buffer, b []byte) {
	if !o.plaintext || len(b) < minExternal {
		o.append(b)
		return
	}
	of.Ref()
	o.external.all = append(o.external.all, externalChunk{at: len(*o.pending), data: b, of: of})
	o.external.size += len(b)
}

// write writes former pending bytes, with the external chunks between them, to w, or to conn over
// TLS. The caller need not hold mu.
func (o *output) write(conn net.Conn, w *writebuffer.Buffer, pending []byte, external externalChunks) error {
	switch {
	case !o.plaintext:
		_, err := conn.Write(pending)
		return err
	case len(external.all) == 0:
		_, err := w.Write(pending)
		return err
	}
	vectors := make([][]byte, 0, 2*len(external.all)+1)
	at := 0
	for _, chunk := range external.all {
		vectors = append(vectors, pending[at:chunk.at], chunk.data)
		at = chunk.at
	}
	return w.WriteAll(append(vectors, pending[at:]))
}

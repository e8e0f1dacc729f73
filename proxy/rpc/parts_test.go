package rpc

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// TestParts: however a message arrives, and however often a part cannot be rewritten yet, all of it
// is rewritten once, in parts of whole fields, into buffers that are nearly full.
func TestParts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		var msg []byte
		for n := r.IntN(300); len(msg) == 0 || n > 0; n-- {
			size := r.IntN(2000)
			if r.IntN(100) == 0 {
				size = PartSize + r.IntN(PartSize)
			}
			msg = protowire.AppendBytes(protowire.AppendTag(msg, 2, protowire.BytesType), bytes.Repeat([]byte{byte(n)}, size))
			msg = protowire.AppendVarint(protowire.AppendTag(msg, 3, protowire.VarintType), r.Uint64())
		}
		damaged := r.IntN(10) == 0
		if damaged {
			msg = msg[:1+r.IntN(len(msg))]
		}
		whole, most := r.IntN(3) == 0, 1+r.IntN(1<<r.IntN(17))
		again := false
		rewrite := func(dst, part []byte) ([]byte, error) {
			if again = !again && r.IntN(2) == 0; again {
				return append(dst, "undone"...)[:0], io.ErrNoProgress
			}
			if n, _ := etcdwire.WholeFields(part); whole && len(part) != len(msg) || !damaged && n != len(part) {
				t.Errorf("a part of %d bytes, of which %d are whole fields", len(part), n)
			}
			return append(dst, part...), nil
		}
		var p Parts
		p.Begin(len(msg), whole)
		for rest := msg; len(rest) > 0; {
			n, err := p.Take(rest[:min(len(rest), 1+r.IntN(most))], rewrite)
			if err == nil && n == 0 {
				t.Fatal("it takes nothing")
			}
			rest = rest[n:]
		}
		_, single := p.Single()
		result := p.Result()
		if got := result.Materialize(); !bytes.Equal(got, msg) {
			t.Fatalf("%d bytes that differ from the %d of the message", len(got), len(msg))
		}
		if single != (len(result) == 1) || whole && !single {
			t.Errorf("in %d buffers: %v", len(result), single)
		}
		result.Free()
		p.Free()
	}
}

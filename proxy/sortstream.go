package proxy

import (
	"bytes"
	"context"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// A RangeStream that sorts by something else than keys, under a rule. etcd refuses one with an
// order, or with one of the filters by revision, and that is left to it. One without an order it
// answers in chunks, each of which it sorts by itself, and goes on after the last key of a sorted
// chunk: so keys may come twice or not at all. Which ones depends on the order of the values and on
// the size of the chunks, and a client is to see what etcd has for the plaintexts: so the chunks
// are made here, of etcd's ranges, by etcd's rules.

const (
	methodRangeStream = "/etcdserverpb.KV/RangeStream"
	firstChunkKeys    = 10
)

// streamExchanger is an exchanger with more than one answer, which it sends.
type streamExchanger interface {
	exchanger
	exchangeStream(ctx context.Context, msg []byte, ask asker, send func([]byte) error) error
}

var _ streamExchanger = (*rangeCall)(nil)

// sortedStream decides who serves a stream that may meet a rule.
func (c *rangeCall) sortedStream(msg []byte) error {
	r := new(pb.RangeRequest)
	if err := decode(msg, r); err != nil {
		return err
	}
	sorts := r.GetSortTarget() != pb.RangeRequest_KEY
	filters := r.GetMinModRevision() != 0 || r.GetMaxModRevision() != 0 || r.GetMinCreateRevision() != 0 || r.GetMaxCreateRevision() != 0
	// What etcd refuses it could answer one day, by ciphertexts.
	c.refused = c.byValue && (r.GetSortOrder() != pb.RangeRequest_NONE || filters)
	_, known := pb.RangeRequest_SortTarget_name[int32(r.GetSortTarget())]
	c.byValue = sorts && known && r.GetSortOrder() == pb.RangeRequest_NONE && !filters && !r.GetCountOnly() && len(r.GetKey()) > 0
	c.touches = c.touches || c.refused
	return nil
}

// exchangeStream implements streamExchanger.
func (c *rangeCall) exchangeStream(ctx context.Context, msg []byte, ask asker, send func([]byte) error) error {
	asked := new(pb.RangeRequest)
	if err := decode(msg, asked); err != nil {
		return c.core.status(err, false)
	}
	header, err := c.pin(ctx, asked, ask)
	if err != nil {
		return err
	}
	total := asked.GetLimit()
	if total == 0 {
		total = math.MaxInt64
	}
	r, _ := proto.Clone(asked).(*pb.RangeRequest)
	if r.Limit = min(firstChunkKeys, total); r.GetRevision() == 0 {
		r.Revision = header.GetRevision()
	}
	for sent := int64(0); ; {
		chunk, err := c.chunk(ctx, r, ask)
		if err != nil {
			return err
		}
		sent += int64(len(chunk.GetKvs()))
		size := sizeOf(chunk, header.GetRevision())
		out := &pb.RangeResponse{Kvs: chunk.GetKvs()}
		if chunk.GetMore() {
			r.Key = append(bytes.Clone(chunk.GetKvs()[len(chunk.GetKvs())-1].GetKey()), 0)
		}
		done := !chunk.GetMore() || sent == total
		if done {
			out.Header, out.More, out.Count = header, chunk.GetMore(), sent
		}
		if done && chunk.GetMore() {
			rest, err := c.askRange(ctx, &pb.RangeRequest{Key: r.GetKey(), RangeEnd: r.GetRangeEnd(), Revision: r.GetRevision(), Serializable: r.GetSerializable(), CountOnly: true}, ask)
			if err != nil {
				return err
			}
			out.Count += rest.GetCount()
		}
		answer, err := encode(&pb.RangeStreamResponse{RangeResponse: out})
		if err != nil {
			return c.core.status(err, true)
		}
		if err := send(answer); err != nil || done {
			return err
		}
		r.Limit = min(nextChunkKeys(r.GetLimit(), size, c.core.maxRequest), total-sent)
	}
}

// pin asks for the number of keys as a stream, so that etcd says whether it has the method, and the
// client the permission. It returns the header, with the revision to read at.
func (c *rangeCall) pin(ctx context.Context, asked *pb.RangeRequest, ask asker) (*pb.ResponseHeader, error) {
	count, _ := proto.Clone(asked).(*pb.RangeRequest)
	count.CountOnly, count.SortTarget = true, pb.RangeRequest_KEY
	msg, err := encode(count)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	if msg, err = ask(ctx, methodRangeStream, msg, maxByValue); err != nil {
		return nil, err
	}
	answer := new(pb.RangeStreamResponse)
	if err := decode(msg, answer); err != nil {
		return nil, c.core.status(err, true)
	}
	return answer.GetRangeResponse().GetHeader(), nil
}

// chunk reads and sorts one chunk.
func (c *rangeCall) chunk(ctx context.Context, r *pb.RangeRequest, ask asker) (*pb.RangeResponse, error) {
	sent, sorts := c.at.unsorted(r)
	chunk, err := c.askRange(ctx, sent, ask)
	if err != nil {
		return nil, tooMuch(err)
	}
	if sorts {
		sortByValue(r, chunk)
	}
	return chunk, nil
}

// sizeOf is the length of a chunk as etcd measures it, before it takes out what a stream says only
// at its end.
func sizeOf(chunk *pb.RangeResponse, revision int64) int {
	met := int64(len(chunk.GetKvs()))
	if chunk.GetMore() {
		met++
	}
	return proto.Size(&pb.RangeResponse{Header: &pb.ResponseHeader{Revision: revision}, Kvs: chunk.GetKvs(), More: chunk.GetMore(), Count: met})
}

// nextChunkKeys is how many keys a chunk has after one with last keys and size bytes, as etcd
// reckons.
func nextChunkKeys(last int64, size, target int) int64 {
	switch {
	case size < target/2:
		last *= 2
	case size > target*2:
		last /= 2
	}
	return max(last, 1)
}

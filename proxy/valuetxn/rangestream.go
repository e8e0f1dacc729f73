package valuetxn

import (
	"bytes"
	"context"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// This file handles a RangeStream that sorts by something else than keys, under a rule. etcd
// refuses such a request if it has an order or a filter by revision, and the proxy forwards it.
// Without an order, etcd sorts each chunk separately and continues after the last key of the sorted
// chunk, so keys can appear twice or not at all. Which keys depends on the order of the values and
// the sizes of the chunks. To return what etcd would return for the plaintexts, the proxy makes the
// chunks itself, from ranges of etcd and by etcd's rules.

const firstChunkKeys = 10

// RangeStream sends the chunks of a stream. header is that of the response, with the revision to
// read at, and target the size of a chunk, in bytes.
func RangeStream(ctx context.Context, store Store, request *pb.RangeRequest, header *pb.ResponseHeader, target int, send func(*pb.RangeStreamResponse) error) error {
	total := request.GetLimit()
	if total == 0 {
		total = math.MaxInt64
	}
	r, _ := proto.Clone(request).(*pb.RangeRequest)
	if r.Limit = min(firstChunkKeys, total); r.GetRevision() == 0 {
		r.Revision = header.GetRevision()
	}
	for sent := int64(0); ; {
		chunk, err := Range(ctx, store, r)
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
			rest, err := store.Range(ctx, &pb.RangeRequest{Key: r.GetKey(), RangeEnd: r.GetRangeEnd(), Revision: r.GetRevision(), Serializable: r.GetSerializable(), CountOnly: true})
			if err != nil {
				return err
			}
			out.Count += rest.GetCount()
		}
		if err := send(&pb.RangeStreamResponse{RangeResponse: out}); err != nil || done {
			return err
		}
		r.Limit = min(nextChunkKeys(r.GetLimit(), size, target), total-sent)
	}
}

// sizeOf is the length of a chunk as etcd measures it, before it takes out what a stream says only
// at its end.
func sizeOf(chunk *pb.RangeResponse, revision int64) int {
	metadata := int64(len(chunk.GetKvs()))
	if chunk.GetMore() {
		metadata++
	}
	return proto.Size(&pb.RangeResponse{Header: &pb.ResponseHeader{Revision: revision}, Kvs: chunk.GetKvs(), More: chunk.GetMore(), Count: metadata})
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

package differential

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestSortedStreams checks that a RangeStream with any target and order, known or not, is answered
// or refused as by etcd, and in the same chunks if it does not sort by key, whether a rule covers
// all of its keys, some or none. etcd sorts each chunk separately, so that keys may occur twice or
// be missing. These must be the same keys too.
func TestSortedStreams(t *testing.T) {
	t.Parallel()
	for _, version := range harness.Versions(t) {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, version, ruleSets[1])
			b.streams(t)
		})
	}
}

func (b *bench) streams(t *testing.T) {
	ctx := t.Context()
	p := b.pair(t)
	// The order of the values differs from that of their keys, and some are equal. The long values
	// make etcd's chunks shorter, and the short ones longer.
	random := rand.New(rand.NewPCG(1, 2))
	fill := func(n int, size func() int) {
		p.reset(ctx)
		for _, prefix := range []string{"/s/", "/u/"} {
			set := b.env.Sealed
			if prefix == "/u/" {
				set = b.env.Clear
			}
			for _, i := range random.Perm(n) {
				value := fmt.Sprintf("%02d", random.IntN(n)) + set.Value("") + strings.Repeat("v", size())
				p.do(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "%s%03d", prefix, i), Value: []byte(value)})
			}
		}
		for _, i := range random.Perm(n)[:n/3] { // versions that differ
			p.do(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "/s/%03d", i), IgnoreValue: true})
		}
	}
	ranges := []*pb.RangeRequest{
		{Key: []byte("/s/"), RangeEnd: []byte("/s0")}, {Key: []byte("/u/"), RangeEnd: []byte("/u0")}, {Key: []byte("/"), RangeEnd: []byte("0")}, {Key: []byte("/s/004"), RangeEnd: []byte("/s/004")},
		{Key: []byte("/s/004")}, {Key: []byte("/s/none")}, {RangeEnd: []byte("/s0")}, {Key: []byte{0}, RangeEnd: []byte{0}},
	}
	var edits []func(*pb.RangeRequest)
	for _, limit := range []int64{1, 7, 10, 11, 25} {
		edits = append(edits, func(r *pb.RangeRequest) { r.Limit = limit })
	}
	edits = append(edits,
		func(*pb.RangeRequest) {}, func(r *pb.RangeRequest) { r.KeysOnly = true }, func(r *pb.RangeRequest) { r.CountOnly = true }, func(r *pb.RangeRequest) { r.Serializable = true },
		func(r *pb.RangeRequest) { r.Revision = 20 }, func(r *pb.RangeRequest) { r.Revision = 1 << 40 }, func(r *pb.RangeRequest) { r.MaxModRevision = 20 }, func(r *pb.RangeRequest) { r.MinCreateRevision = 20 },
	)
	answered := 0
	try := func(all []*pb.RangeRequest, targets, orders int32, edits []func(*pb.RangeRequest)) {
		for _, of := range all {
			for target := range targets + 1 { // a key that does not exist
				for order := range orders + 1 {
					for _, edit := range edits {
						r, _ := proto.Clone(of).(*pb.RangeRequest)
						r.SortTarget, r.SortOrder = pb.RangeRequest_SortTarget(target), pb.RangeRequest_SortOrder(order)
						edit(r)
						a := p.do(ctx, stream{r})
						if a.err == nil {
							answered++
						}
						if a.err == nil && r.SortTarget != pb.RangeRequest_KEY {
							p.sameChunks(ctx, r)
						}
						if len(p.trace) > 200 {
							p.trace = p.trace[100:]
						}
					}
				}
			}
		}
	}
	fill(9, func() int { return 10 })
	try(ranges, 5, 3, edits)
	fill(60, func() int { return 10 })
	try(ranges, 5, 3, edits)
	fill(40, func() int { return []int{10, 150 << 10, 400 << 10}[random.IntN(3)] })
	try(ranges[:3], 5, 1, edits[len(edits)-8:len(edits)-6])
	known := p.do(ctx, stream{ranges[0]}).err.Code() != codes.Unimplemented
	if known != (answered > 200) {
		t.Errorf("%d streams were answered: this proves little", answered)
	}
}

// sameChunks compares a stream message by message.
func (p *pair) sameChunks(ctx context.Context, r *pb.RangeRequest) {
	p.t.Helper()
	var all [2][]*pb.RangeStreamResponse
	for i, side := range []*side{p.bare, p.proxy} {
		s, err := side.kv.RangeStream(ctx, r)
		for err == nil {
			var chunk *pb.RangeStreamResponse
			if chunk, err = s.Recv(); err == nil {
				if h := chunk.GetRangeResponse().GetHeader(); h != nil {
					h.RaftTerm = 0
				}
				all[i] = append(all[i], chunk)
			}
		}
		if !errors.Is(err, io.EOF) {
			p.fail("%s: %v", side.name, err)
		}
	}
	for i := range max(len(all[0]), len(all[1])) {
		if i >= len(all[0]) || i >= len(all[1]) || !proto.Equal(all[0][i], all[1][i]) {
			p.fail("RangeStream %s: chunk %d of %d and %d differs", text(r), i, len(all[0]), len(all[1]))
		}
	}
}

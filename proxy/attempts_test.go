package proxy

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// attempts makes calls of all kinds: most are as a client makes them, cut into frames in some way,
// and the others are odd in one way or another.
func attempts(r *rand.Rand) proxytest.Attempt {
	keys := []string{"s/a", "s/b", "t/a", "", "own/x"}
	key := func() []byte { return []byte(keys[r.IntN(len(keys))]) }
	value := func() []byte { return bytes.Repeat([]byte("v"), []int{0, 1, 300, 8000}[r.IntN(4)]) }
	put := func() *pb.PutRequest { return &pb.PutRequest{Key: key(), Value: value(), PrevKv: r.IntN(2) == 0} }
	methods := map[string]proto.Message{
		"etcdserverpb.KV/Range":             &pb.RangeRequest{Key: key(), RangeEnd: [][]byte{nil, []byte("z")}[r.IntN(2)], KeysOnly: r.IntN(4) == 0, SortTarget: pb.RangeRequest_SortTarget(r.IntN(5))},
		"etcdserverpb.KV/Put":               put(),
		"etcdserverpb.KV/DeleteRange":       &pb.DeleteRangeRequest{Key: key(), PrevKv: true},
		"etcdserverpb.KV/Txn":               &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: put()}}}},
		"etcdserverpb.KV/RangeStream":       &pb.RangeRequest{Key: key(), RangeEnd: []byte("z")},
		"etcdserverpb.KV/Compact":           &pb.CompactionRequest{Revision: 1},
		"etcdserverpb.Watch/Watch":          &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: key()}}},
		"etcdserverpb.Lease/LeaseKeepAlive": &pb.LeaseKeepAliveRequest{ID: 1},
		"etcdserverpb.KV/Nothing":           &pb.RangeRequest{},
		"v3electionpb.Election/Leader":      &pb.RangeRequest{Key: key()},
	}
	names := slices.Sorted(func(yield func(string) bool) {
		for name := range methods {
			if !yield(name) {
				return
			}
		}
	})
	name := names[r.IntN(len(names))]
	a := proxytest.Attempt{Fields: []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/" + name}, {Name: ":authority", Value: "x"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}}
	msg, _ := proto.Marshal(methods[name])
	count := 1
	odd := r.IntN(24)
	flag := byte(0)
	switch odd {
	case 0:
		count = 0
	case 1:
		count = 2
	case 2:
		msg = msg[:r.IntN(len(msg)+1)]
	case 3:
		if len(msg) > 0 {
			msg[r.IntN(len(msg))] ^= 1 << r.IntN(8)
		}
	case 4:
		flag = byte(1 + r.IntN(255))
	case 5:
		a.Fields = append(a.Fields, hpack.HeaderField{Name: "grpc-timeout", Value: []string{"1H", "soon", "100000000S", "5"}[r.IntN(4)]})
	case 6:
		a.Fields = append(a.Fields, hpack.HeaderField{Name: "x-bin", Value: []string{"YQ", "YQ==", "%", "YQ="}[r.IntN(4)]})
	case 7:
		a.Fields[4].Value = []string{"application/grpc+proto", "application/grpc+json", "application/json", "application/grpc;x"}[r.IntN(4)]
	case 8:
		a.Fields = append(a.Fields, hpack.HeaderField{Name: "grpc-encoding", Value: []string{"gzip", "identity", "rot13"}[r.IntN(3)]})
	case 9:
		a.Fields = append(a.Fields, hpack.HeaderField{Name: upstream.MarkHeader, Value: "etcd"})
	case 10:
		a.Reset = true
	case 13, 14, 15:
		for _, m := range etcdapi.MethodTable() {
			a.Open = a.Open || m.Shape == etcdapi.ShapeUnary && m.Path == "/"+name
		}
	case 11:
		a.Fields = append(a.Fields, hpack.HeaderField{Name: "token", Value: strings.Repeat("t", r.IntN(20_000))})
	}
	var raw []byte
	for range count {
		raw = append(raw, flag)
		raw = binary.BigEndian.AppendUint32(raw, uint32(len(msg)))
		raw = append(raw, msg...)
	}
	if odd == 12 && len(raw) > 0 {
		raw = raw[:r.IntN(len(raw))]
	}
	for len(raw) > 0 {
		n := min(len(raw), []int{1, 2, 5, 100, 16_000}[r.IntN(5)])
		if len(a.Frames) > 100 {
			n = min(len(raw), 16_000)
		}
		a.Frames = append(a.Frames, raw[:n])
		raw = raw[n:]
	}
	if len(a.Frames) == 0 || r.IntN(4) == 0 {
		a.Frames = append(a.Frames, nil)
	}
	for range a.Frames {
		a.Padded = append(a.Padded, r.IntN(8) == 0)
	}
	return a
}

// TestRelayedAndHandledAgree: whatever a client makes of a call, in well-formed frames, it gets the
// same response from a proxy that relays calls as from one that handles them.
func TestRelayedAndHandledAgree(t *testing.T) {
	etcd := proxytest.ServeStore(t, "s/a", "t/a", "s/b")
	start := func(relays bool) *proxytest.Talker {
		p := startRelaying(t, etcd, []etcdapi.Rule{{Prefix: "s/", Sealer: proxytest.Reverser{}}}, func(c *Config) { c.OwnPrefixes = []string{"own/"} }, relays)
		return proxytest.NewTalker(t, p.Addrs()[0].String())
	}
	agree(t, start(false), start(true), nil)
}

// TestOddRequestsAsAtGRPC: whatever a client makes of a call, it gets the same response through a
// proxy without rules as from the server of grpc-go that is behind it.
func TestOddRequestsAsAtGRPC(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		etcd := proxytest.ServeStore(t, "s/a", "t/a", "s/b")
		agree(t, proxytest.NewTalker(t, etcd), proxytest.NewTalker(t, startProxy(t, etcd, nil, nil).Addrs()[0].String()), func(a proxytest.Attempt) bool {
			return slices.ContainsFunc(a.Fields, func(f hpack.HeaderField) bool {
				// a service that serveStore has not
				return f.Name == upstream.MarkHeader || strings.HasPrefix(f.Value, "/v3electionpb.")
			})
		})
	})
}

// agree makes the same attempts at two servers, but for those that skip picks.
func agree(t *testing.T, first, second *proxytest.Talker, skip func(proxytest.Attempt) bool) {
	t.Helper()
	n := 2000
	if testing.Short() {
		n = 300
	}
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	codes := map[string]int{}
	for i := range n {
		a := attempts(r)
		if skip != nil && skip(a) {
			continue
		}
		want, got := first.Try(t, a), second.Try(t, a)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("seed %d, attempt %d, %s, %d frames, %s (-first +second):\n%s", seed, i, a.Fields[2].Value, len(a.Frames), fmt.Sprint(a.Fields[4:]), diff)
		}
		codes[strings.Join(got.Trailer, " ")+got.Reset]++
	}
	if len(codes) < 8 {
		t.Errorf("only %d kinds of answers: %v", len(codes), codes)
	}
}

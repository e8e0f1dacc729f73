package proxy

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// attempt is one call as frames: whatever a client may make of it.
type attempt struct {
	fields []hpack.HeaderField
	bare   bool // the end is in the headers
	frames [][]byte
	padded []bool
	reset  bool // in place of an end
	open   bool // no end comes
}

// reply is what comes of it.
type reply struct {
	Data    []byte
	Trailer []string
	Reset   string
}

// talker speaks HTTP/2 word for word.
type talker struct {
	*http2.Framer
	conn net.Conn
	next uint32
	enc  *hpack.Encoder
	buf  *bytes.Buffer
}

func newTalker(t *testing.T, address string) *talker {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return newTalkerOn(t, conn)
}

func newTalkerOn(t *testing.T, conn net.Conn) *talker {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	c := &talker{Framer: http2.NewFramer(conn, conn), conn: conn, next: 1, buf: new(bytes.Buffer)}
	c.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.enc = hpack.NewEncoder(c.buf)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteWindowUpdate(0, 1<<30); err != nil {
		t.Fatal(err)
	}
	return c
}

// try makes the attempt and returns what comes of it.
func (c *talker) try(t *testing.T, a attempt) reply {
	t.Helper()
	id := c.next
	c.next += 2
	c.buf.Reset()
	for _, f := range a.fields {
		_ = c.enc.WriteField(f)
	}
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(c.conn.SetDeadline(time.Now().Add(patience)))
	check(c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: c.buf.Bytes(), EndHeaders: true, EndStream: a.bare}))
	for i, f := range a.frames {
		end := i == len(a.frames)-1 && !a.bare && !a.reset && !a.open
		if a.padded[i] {
			check(c.WriteDataPadded(id, end, f, make([]byte, 1+i%200)))
		} else {
			check(c.WriteData(id, end, f))
		}
	}
	if a.reset {
		check(c.WriteRSTStream(id, http2.ErrCodeCancel))
		return reply{Reset: "by the client"}
	}
	var got reply
	for {
		f, err := c.ReadFrame()
		if err != nil {
			t.Fatalf("%v: %d frames, open %t, bare %t, %v", err, len(a.frames), a.open, a.bare, a.fields)
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				check(c.WriteSettingsAck())
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				check(c.WritePing(true, f.Data))
			}
		case *http2.DataFrame:
			if f.StreamID == id {
				if got.Data = append(got.Data, f.Data()...); f.StreamEnded() { // of HTTP alone
					return got
				}
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id && f.ErrCode != http2.ErrCodeNo {
				got.Reset = f.ErrCode.String()
				return got
			}
		case *http2.MetaHeadersFrame:
			if f.StreamID == id && f.StreamEnded() {
				for _, h := range f.Fields {
					if strings.HasPrefix(h.Name, "grpc-") {
						got.Trailer = append(got.Trailer, h.Name+": "+h.Value)
					}
				}
				slices.Sort(got.Trailer)
				return got
			}
		}
	}
}

// attempts makes calls of all kinds: most are as a client makes them, cut into frames in some way, and the others are odd in one way or another.
func attempts(r *rand.Rand) attempt {
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
	a := attempt{fields: []hpack.HeaderField{
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
		a.fields = append(a.fields, hpack.HeaderField{Name: "grpc-timeout", Value: []string{"1H", "soon", "100000000S", "5"}[r.IntN(4)]})
	case 6:
		a.fields = append(a.fields, hpack.HeaderField{Name: "x-bin", Value: []string{"YQ", "YQ==", "%", "YQ="}[r.IntN(4)]})
	case 7:
		a.fields[4].Value = []string{"application/grpc+proto", "application/grpc+json", "application/json", "application/grpc;x"}[r.IntN(4)]
	case 8:
		a.fields = append(a.fields, hpack.HeaderField{Name: "grpc-encoding", Value: []string{"gzip", "identity", "rot13"}[r.IntN(3)]})
	case 9:
		a.fields = append(a.fields, hpack.HeaderField{Name: meantForEtcd, Value: "etcd"})
	case 10:
		a.reset = true
	case 13, 14, 15:
		for _, m := range methodTable() {
			a.open = a.open || m.shape == shapeUnary && m.full == "/"+name
		}
	case 11:
		a.fields = append(a.fields, hpack.HeaderField{Name: "token", Value: strings.Repeat("t", r.IntN(20_000))})
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
		if len(a.frames) > 100 {
			n = min(len(raw), 16_000)
		}
		a.frames = append(a.frames, raw[:n])
		raw = raw[n:]
	}
	if len(a.frames) == 0 || r.IntN(4) == 0 {
		a.frames = append(a.frames, nil)
	}
	for range a.frames {
		a.padded = append(a.padded, r.IntN(8) == 0)
	}
	return a
}

// TestRelayedAndHandledAgree: whatever a client makes of a call, in well-formed frames, it gets the same response
// from a proxy that relays calls as from one that handles them.
func TestRelayedAndHandledAgree(t *testing.T) {
	etcd := serveStore(t, "s/a", "t/a", "s/b")
	start := func(relays bool) *talker {
		p := startRelaying(t, etcd, []Rule{{Prefix: "s/", Sealer: reverser{}}}, func(c *Config) { c.OwnPrefixes = []string{"own/"} }, relays)
		return newTalker(t, p.Addrs()[0].String())
	}
	agree(t, start(false), start(true), nil)
}

// TestOddRequestsAsAtGRPC: whatever a client makes of a call, it gets the same response through a proxy without rules
// as from the server of grpc-go that is behind it.
func TestOddRequestsAsAtGRPC(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		etcd := serveStore(t, "s/a", "t/a", "s/b")
		agree(t, newTalker(t, etcd), newTalker(t, startProxy(t, etcd, nil, nil).Addrs()[0].String()), func(a attempt) bool {
			return slices.ContainsFunc(a.fields, func(f hpack.HeaderField) bool {
				return f.Name == meantForEtcd || strings.HasPrefix(f.Value, "/v3electionpb.") // a service that serveStore has not
			})
		})
	})
}

// agree makes the same attempts at two servers, but for those that skip picks.
func agree(t *testing.T, first, second *talker, skip func(attempt) bool) {
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
		want, got := first.try(t, a), second.try(t, a)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("seed %d, attempt %d, %s, %d frames, %s (-first +second):\n%s", seed, i, a.fields[2].Value, len(a.frames), fmt.Sprint(a.fields[4:]), diff)
		}
		codes[strings.Join(got.Trailer, " ")+got.Reset]++
	}
	if len(codes) < 8 {
		t.Errorf("only %d kinds of answers: %v", len(codes), codes)
	}
}

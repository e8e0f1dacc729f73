package limits

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	_ "google.golang.org/grpc/encoding/gzip" // what clients may use
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// compare asks both sides, and wants them to say the same.
func (s *site) compare(t *testing.T, what string, ask func(conn *grpc.ClientConn) string) {
	t.Helper()
	answers := make(map[string]string)
	for side, address := range s.sides() {
		answers[side] = ask(dial(t, address))
	}
	t.Logf("%s: %.300s", what, answers["the proxy"])
	if want, got := answers["bare etcd"], answers["the proxy"]; want != got {
		t.Errorf("%s\nbare etcd: %.500s\nthe proxy: %.500s", what, want, got)
	}
}

// moves is what honest clients and time change.
var moves = regexp.MustCompile(`(revision|raft_term):\d+`)

func says(m any, err error) string {
	if err != nil {
		st := status.Convert(err)
		return fmt.Sprintf("%v %q", st.Code(), st.Message())
	}
	text := moves.ReplaceAllString(fmt.Sprint(m), "")
	return strings.ReplaceAll(text, "  ", " ") // protobuf's texts vary in that
}

// TestServices: health, compression and headers that are too large, as etcd has them.
func TestServices(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil)
	done := s.honestClient(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for _, name := range []string{"", "etcdserverpb.Health", "grpc.health.v1.Health", "etcdserverpb.KV", "nobody"} {
		s.compare(t, "health of "+name, func(conn *grpc.ClientConn) string {
			return says(healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: name}))
		})
		s.compare(t, "a watch of the health of "+name, func(conn *grpc.ClientConn) string {
			w, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{Service: name})
			if err != nil {
				return says(nil, err)
			}
			return says(w.Recv())
		})
	}
	s.compare(t, "all health", func(conn *grpc.ClientConn) string {
		return says(healthpb.NewHealthClient(conn).List(ctx, &healthpb.HealthListRequest{}))
	})
	s.compare(t, "gzip", func(conn *grpc.ClientConn) string {
		return says(pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("none")}, grpc.UseCompressor("gzip")))
	})
	s.compare(t, "gzip of much more than a request may have", func(conn *grpc.ClientConn) string {
		r, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte("bomb"), Value: make([]byte, 200<<20)}, grpc.UseCompressor("gzip"))
		return says(r, err)
	})
	s.compare(t, "gzip in a stream", func(conn *grpc.ClientConn) string {
		w, err := pb.NewWatchClient(conn).Watch(ctx, grpc.UseCompressor("gzip"))
		if err != nil {
			return says(nil, err)
		}
		_ = w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("k")}}})
		return says(w.Recv())
	})
	largeMetadata := func(conn *grpc.ClientConn, kib int) string {
		with := metadata.AppendToOutgoingContext(ctx, "x-large", strings.Repeat("l", kib<<10))
		r, err := pb.NewKVClient(conn).Range(with, &pb.RangeRequest{Key: []byte("none"), CountOnly: true})
		return says(r.GetCount(), err)
	}
	for _, kib := range []int{1, 60} {
		s.compare(t, fmt.Sprintf("metadata of %d KiB", kib), func(conn *grpc.ClientConn) string { return largeMetadata(conn, kib) })
	}
	// The proxy accepts header lists of 64 KiB, and etcd of 16 MiB over HTTP/2 and of 1 MiB over
	// HTTP/1. grpc-go obeys the limit that a server advertises: it does not send a call that
	// exceeds it.
	for _, kib := range []int{70, 15_000, 17_000} {
		const want = `Internal "header list size to send violates the maximum size (65536 bytes) set by server"`
		if got := largeMetadata(dial(t, s.proxy.Address), kib); got != want {
			t.Errorf("metadata of %d KiB: the proxy: %s", kib, got)
		}
	}
	const tooLarge = "HTTP/1.1 431"
	for _, kib := range []int{1, 60, 70, 900, 1100, 20_000} {
		answers := make(map[string]string)
		for side, address := range s.sides() {
			answers[side] = overHTTP1(t, address, strings.Repeat("l", kib<<10))
		}
		want, got := answers["bare etcd"], answers["the proxy"]
		if kib > 64 {
			want = tooLarge
		}
		if want != got {
			t.Errorf("a header of %d KiB over HTTP/1\nbare etcd: %q\nthe proxy: %q", kib, want, got)
		}
		t.Logf("a header of %d KiB over HTTP/1: %q", kib, answers["the proxy"])
	}
	done()
}

// overHTTP1 returns the first line of the answer to a request with a header of that value. A server
// need not read it to its end.
func overHTTP1(t *testing.T, address, value string) string {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	go func() {
		_, _ = io.WriteString(conn, "GET /version HTTP/1.1\r\nHost: localhost\r\nX-Large: "+value+"\r\n\r\n")
	}()
	line := make([]byte, len("HTTP/1.1 431"))
	if _, err := io.ReadFull(conn, line); err != nil {
		return "closed"
	}
	return string(line)
}

// recorder is an etcd that answers nothing and notes who asks.
type recorder struct {
	got chan metadata.MD
}

func (r *recorder) handle(_ any, ss grpc.ServerStream) error {
	md, _ := metadata.FromIncomingContext(ss.Context())
	method, _ := grpc.MethodFromServerStream(ss)
	if strings.HasPrefix(method, "/grpc.health") {
		return nil
	}
	asked := new(healthpb.HealthCheckRequest) // whose first field is where others have a key
	err := ss.RecvMsg(asked)
	// what the proxy asks for itself
	if !strings.HasPrefix(asked.GetService(), "/etcd-kms-proxy/") {
		select {
		case r.got <- md:
		default:
		}
	}
	_ = ss.SetHeader(metadata.Pairs("x-answer", "1", "x-answer", "2", "x-answer-bin", "\x00\xfe"))
	ss.SetTrailer(metadata.Pairs("x-end", "3", "x-end-bin", "\xff\x00"))
	if err != nil {
		return err
	}
	return ss.SendMsg(new(healthpb.HealthCheckResponse))
}

// TestTracing: what a client's tracing says of a call arrives at etcd with it, word for word,
// whatever way the call goes, and what etcd adds to its answer comes back.
func TestTracing(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{got: make(chan metadata.MD, 100)}
	server := grpc.NewServer(grpc.UnknownServiceHandler(r.handle))
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	s := newSiteBefore(t, "http://"+l.Addr().String())
	sent := metadata.Pairs(
		"traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		"tracestate", "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7", "tracestate", "other=1",
		"baggage", "userId=alice,serverNode=DF%2028;p=1", "grpc-trace-bin", "\x00\x00\x01\xff", "x-custom", "a b", "x-custom-bin", "\x00\xff\n",
	)
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(t.Context(), sent), 30*time.Second)
	defer cancel()
	conn := dial(t, s.proxy.Address)
	kv := pb.NewKVClient(conn)
	var header, trailer metadata.MD
	options := []grpc.CallOption{grpc.Header(&header), grpc.Trailer(&trailer)}
	value := &pb.Compare{Key: []byte("k"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("v")}}
	for name, ask := range map[string]func() error{
		"a range": func() error { _, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("k")}, options...); return err },
		"a put": func() error {
			_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}, options...)
			return err
		},
		"a sort": func() error {
			_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), SortTarget: pb.RangeRequest_VALUE}, options...)
			return err
		},
		"a status": func() error {
			_, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{}, options...)
			return err
		},
		"a watch": func() error {
			w, err := pb.NewWatchClient(conn).Watch(ctx)
			if err != nil {
				return err
			}
			if err := w.Send(&pb.WatchRequest{}); err != nil {
				return err
			}
			if header, err = w.Header(); err != nil {
				return err
			}
			for err == nil {
				_, err = w.Recv()
			}
			trailer = w.Trailer()
			return nil
		},
	} {
		header, trailer = nil, nil
		if err := ask(); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		s.arrived(t, name, r, sent)
		for k, want := range metadata.Pairs("x-answer", "1", "x-answer", "2", "x-answer-bin", "\x00\xfe") {
			if !slices.Equal(header[k], want) {
				t.Errorf("%s: header %s is %q, want %q", name, k, header[k], want)
			}
		}
		for k, want := range metadata.Pairs("x-end", "3", "x-end-bin", "\xff\x00") {
			if !slices.Equal(trailer[k], want) {
				t.Errorf("%s: trailer %s is %q, want %q", name, k, trailer[k], want)
			}
		}
	}
	// These ask etcd more than once, and an etcd that answers nothing is no use to them.
	brief, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	_, _ = kv.Txn(brief, &pb.TxnRequest{Compare: []*pb.Compare{value}})
	s.arrived(t, "a compare by value", r, sent)
	request, err := http.NewRequestWithContext(ctx, "POST", "http://"+s.proxy.Address+"/v3/kv/range", strings.NewReader(`{"key":"aw=="}`))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Grpc-Metadata-Traceparent", sent["traceparent"][0])
	// the binary headers of this answer are not for HTTP/1
	if answer, err := http.DefaultClient.Do(request); err == nil {
		answer.Body.Close()
	}
	s.arrived(t, "the gateway", r, metadata.MD{"traceparent": sent["traceparent"]})
}

// arrived wants what was sent in everything that etcd was asked.
func (s *site) arrived(t *testing.T, name string, r *recorder, sent metadata.MD) {
	t.Helper()
	for n := 0; ; n++ {
		select {
		case got := <-r.got:
			for k, want := range sent {
				if !slices.Equal(got[k], want) {
					t.Errorf("%s: %s arrives as %q, want %q", name, k, got[k], want)
				}
			}
		default:
			if n == 0 {
				t.Errorf("%s: etcd was not asked", name)
			}
			return
		}
	}
}

package limits

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestLargeRequests: what etcd allows passes at a hundred megabytes, too, and what it does not is
// refused as etcd refuses it.
func TestLargeRequests(t *testing.T) {
	limit := 100 << 20
	if testing.Short() {
		limit = 20 << 20
	}
	s := newSite(t, limit, nil)
	before := s.usage(t)
	value := append([]byte(s.env.Sealed.Value("large")), bytes.Repeat([]byte("v"), limit-1000)...)
	value = value[:limit-1000]
	for what, size := range map[string]int{"just what fits": limit - 1000, "a little more": limit + 100, "more than gRPC takes": limit + 1<<20} {
		s.compare(t, what, func(conn *grpc.ClientConn) string {
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			put := &pb.PutRequest{Key: []byte("/large"), Value: append(value[:len(value):len(value)], make([]byte, size-len(value))...)}
			return says(pb.NewKVClient(conn).Put(ctx, put))
		})
	}
	got, err := pb.NewKVClient(harness.Dial(t, s.proxy.Address, nil)).Range(t.Context(), &pb.RangeRequest{Key: []byte("/large")})
	if err != nil || len(got.Kvs) != 1 || !bytes.Equal(got.Kvs[0].Value, value) {
		t.Errorf("%d keys, or another value; %v", len(got.GetKvs()), err)
	}
	s.settles(t, before)
	// The request as it came, sealed, and on its way; the answer likewise; and garbage.
	if u := s.usage(t); u.peak > before.peak+int64(limit)*10 {
		t.Errorf("before %v, after %v", before, u)
	}
}

// TestLargeAnswers: a list of 300 MB passes, or of as many as LIMITS_ANSWER_MB says. A stream of it
// takes no memory to speak of, a whole one what it is worth.
func TestLargeAnswers(t *testing.T) {
	megabytes := 300
	if testing.Short() {
		megabytes = 64
	}
	if text := os.Getenv("LIMITS_ANSWER_MB"); text != "" {
		var err error
		if megabytes, err = strconv.Atoi(text); err != nil {
			t.Fatalf("read LIMITS_ANSWER_MB: %v", err)
		}
	}
	s := newSite(t, 0, nil, "--quota-backend-bytes", "8589934592")
	conn := harness.Dial(t, s.proxy.Address, nil)
	kv := pb.NewKVClient(conn)
	value := s.env.Sealed.Value(strings.Repeat("v", 1_000_000))
	fill(t, kv, "/list/", megabytes, []byte(value))
	before := s.usage(t)
	list := &pb.RangeRequest{Key: []byte("/list/"), RangeEnd: []byte("/list0")}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()

	done := s.honestClient(t)
	stream, err := kv.RangeStream(ctx, list)
	if err != nil {
		t.Fatal(err)
	}
	keys := 0
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("after %d keys: %v", keys, err)
		}
		for _, kv := range chunk.RangeResponse.Kvs {
			if string(kv.Value) != value || string(kv.Key) != fmt.Sprintf("/list/%06d", keys) {
				t.Fatalf("key %d is %s, or has another value", keys, kv.Key)
			}
			keys++
		}
	}
	done()
	s.settles(t, before)
	streamed := s.usage(t)
	t.Logf("before %v, after a stream of %d MB %v", before, megabytes, streamed)
	if keys != megabytes || streamed.peak > before.peak+96<<20 {
		t.Errorf("%d keys; before %v, after %v", keys, before, streamed)
	}

	done = s.honestClient(t)
	whole, err := kv.Range(ctx, list, grpc.MaxCallRecvMsgSize(1<<31-1))
	if err != nil || len(whole.Kvs) != megabytes || string(whole.Kvs[megabytes-1].Value) != value {
		t.Errorf("%d keys, %v", len(whole.GetKvs()), err)
	}
	whole = nil
	done()
	s.settles(t, before)
	after := s.usage(t)
	t.Logf("after a list of it %v", after)
	// as it came, as it goes, and garbage
	if after.peak > streamed.peak+int64(megabytes)*3<<20+96<<20 {
		t.Errorf("before %v, after %v", streamed, after)
	}
}

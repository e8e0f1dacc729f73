package limits

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestConcurrentStreams: an etcd that allows a hundred streams on a connection does not make the
// clients of the proxy, which are on few connections to it, wait for each other: neither many
// watches through one of them, nor a call of another beside them.
func TestConcurrentStreams(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil, "--max-concurrent-streams", "100")
	var before usage // with the connections that a thousand take, which stay for a while
	for _, n := range []int{1, 10, 100, 1000, 1000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			done := s.honestClient(t)
			conn := harness.Dial(t, s.proxy.Address, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			client := pb.NewWatchClient(conn)
			var all sync.WaitGroup
			created := make(chan struct{}, n)
			value := s.env.Sealed.Value("told to all")
			for range n {
				all.Go(func() {
					w, err := client.Watch(ctx)
					if err == nil {
						err = w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("/watched")}}})
					}
					if err == nil {
						_, err = w.Recv()
					}
					created <- struct{}{}
					if err != nil {
						t.Errorf("create: %v", err)
						return
					}
					if r, err := w.Recv(); err != nil || string(r.Events[0].Kv.Value) != value {
						t.Errorf("%d events, %v", len(r.GetEvents()), err)
					}
				})
			}
			for range n {
				<-created
			}
			if err := once(pb.NewKVClient(conn), "/beside", value); err != nil {
				t.Errorf("a call on the same connection: %v", err)
			}
			if _, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte("/watched"), Value: []byte(value)}); err != nil {
				t.Errorf("a put on the same connection: %v", err)
			}
			all.Wait()
			cancel()
			done()
			conn.Close()
			if before.goroutines > 0 {
				s.settles(t, before)
			}
		})
		if n == 1000 && before.goroutines == 0 {
			harness.Eventually(t, 20*time.Second, "the watches to end", func() error {
				if before = s.usage(t); before.goroutines > 200 {
					return fmt.Errorf("%v", before)
				}
				return nil
			})
		}
	}
}

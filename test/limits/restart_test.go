package limits

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestEtcdRestarts: an etcd that dies takes the calls in flight with it, with the codes that its
// own clients see, but not the connections to the proxy, which serves on them as soon as etcd is
// back.
func TestEtcdRestarts(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil)
	type outcome struct {
		watch string
		put   codes.Code // its text is the proxy's own, as etcd has said nothing of it
	}
	ends := make(map[string]outcome)
	open := greet(t, s.proxy.Address) // hears it if the proxy sends clients away
	var kept *grpc.ClientConn
	for side, address := range s.sides() {
		etcd := s.behind
		if side == "bare etcd" {
			etcd = s.bare
		}
		conn := dial(t, address)
		if side == "the proxy" {
			kept = conn
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := once(pb.NewKVClient(conn), "/restart", s.env.Sealed.Value("before")); err != nil {
			t.Fatalf("%s: %v", side, err)
		}
		w, err := pb.NewWatchClient(conn).Watch(ctx)
		if err == nil {
			err = w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("k")}}})
		}
		if err == nil {
			_, err = w.Recv()
		}
		if err != nil {
			t.Fatalf("%s: %v", side, err)
		}
		// It holds its breath, so that the put is in flight when it dies.
		if err := syscall.Kill(etcd.PID(), syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		begun := s.metric(t, "grpc_server_msg_received_total")
		put := make(chan error, 1)
		go func() {
			_, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte("/restart"), Value: []byte(s.env.Sealed.Value("in flight"))})
			put <- err
		}()
		if side == "the proxy" {
			harness.Eventually(t, 10*time.Second, "the put to reach the proxy", func() error {
				if n := s.metric(t, "grpc_server_msg_received_total"); n == begun {
					return fmt.Errorf("%v messages", n)
				}
				return nil
			})
		}
		etcd.Kill()
		_, watchErr := w.Recv()
		putErr := <-put
		t.Logf("%s: the watch ends with %v; the put with %v", side, watchErr, putErr)
		// Whether the system says EOF or reset is a matter of luck.
		text := strings.Replace(says(nil, watchErr), "connection reset by peer", "EOF", 1)
		ends[side] = outcome{text, status.Code(putErr)}
	}
	if want, got := ends["bare etcd"], ends["the proxy"]; want != got || got.put != codes.Unavailable || !strings.HasPrefix(got.watch, "Unavailable ") {
		t.Errorf("\nbare etcd: %v\nthe proxy: %v", want, got)
	}
	if heard := open.settled(); !slices.Equal(heard, []string{"open"}) {
		t.Errorf("another client's connection: %q", heard)
	}
	s.behind.Start()
	harness.Eventually(t, 10*time.Second, "the proxy to serve again", func() error {
		return once(pb.NewKVClient(kept), "/restart", s.env.Sealed.Value("after"))
	})
	open.begin(1, message(0, []byte("\x0a\x01k")), call("/etcdserverpb.KV/Range")...)
	if heard := open.listen(time.Second); !strings.Contains(strings.Join(heard, " "), "grpc-status: 0") || slices.Contains(heard, "closed") {
		t.Errorf("on the connection from before: %q", heard)
	}
}

// TestDrainSendsAway: a proxy that is told to end sends its clients away by GOAWAY as etcd does,
// and finishes their calls.
func TestDrainSendsAway(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil)
	heard := make(map[string][]string)
	for side, address := range s.sides() {
		k := greet(t, address)
		k.settled()
		frames := make(chan []string, 1)
		go func() { frames <- last(k.listen(20 * time.Second)) }()
		if side == "the proxy" {
			s.proxy.Stop(20 * time.Second)
		} else {
			s.bare.Stop(20 * time.Second)
		}
		heard[side] = <-frames
	}
	if want, got := heard["bare etcd"], heard["the proxy"]; !slices.Equal(want, got) || got[len(got)-1] != "closed" || !strings.HasPrefix(got[0], "GOAWAY NO_ERROR") {
		t.Errorf("\nbare etcd: %q\nthe proxy: %q", want, got)
	}
	t.Logf("%q", heard)
}

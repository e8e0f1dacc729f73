package harness

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// recordingTest is a test that records its failures.
type recordingTest struct {
	testing.TB
	mu       sync.Mutex
	failures []string
}

func (w *recordingTest) Errorf(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failures = append(w.failures, format)
}

func (w *recordingTest) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.failures)
}

// secretErrors is a server whose errors contain secrets.
type secretErrors struct {
	pb.UnimplementedKVServer
	pb.UnimplementedWatchServer
	text, detail string
}

func (g *secretErrors) err() error {
	s, err := status.New(codes.DataLoss, g.text).WithDetails(&pb.Member{Name: g.detail})
	if err != nil {
		return err
	}
	return s.Err()
}

func (g *secretErrors) Range(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
	return nil, g.err()
}

func (g *secretErrors) Watch(pb.Watch_WatchServer) error { return g.err() }

// TestErrorsAreSearched checks that a secret in the text or details of an error fails the test that
// it belongs to, whichever test received it, and no other test.
func TestErrorsAreSearched(t *testing.T) {
	g := &secretErrors{}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pb.RegisterKVServer(server, g)
	pb.RegisterWatchServer(server, g)
	var served sync.WaitGroup
	served.Go(func() { _ = server.Serve(l) })
	defer served.Wait()
	defer server.Stop()
	conn := Dial(t, l.Addr().String(), nil)
	for name, tc := range map[string]struct {
		text, detail string
		want         int
	}{
		"harmless":     {"the value of /sealed/a is damaged", "nothing", 0},
		"in the text":  {"the value SECRET is damaged", "nothing", 1},
		"in a detail":  {"the value is damaged", "SECRET", 1},
		"of no rule":   {"the value CLEAR is damaged", "nothing", 1},
		"of no test":   {"the value Canary0123456789ab is damaged", "nothing", 0},
		"both at once": {"SECRET", "CLEAR", 2},
	} {
		t.Run(name, func(t *testing.T) {
			w := &recordingTest{TB: t}
			env := New(w)
			fill := strings.NewReplacer("SECRET", env.Sealed.Value("x"), "CLEAR", env.Clear.Value("y"))
			g.text, g.detail = fill.Replace(tc.text), fill.Replace(tc.detail)
			if _, err := pb.NewKVClient(conn).Range(t.Context(), &pb.RangeRequest{}); status.Code(err) != codes.DataLoss {
				t.Fatal(err)
			}
			if n := w.count(); n != tc.want {
				t.Errorf("%d failures after a unary call, want %d", n, tc.want)
			}
			stream, err := pb.NewWatchClient(conn).Watch(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); status.Code(err) != codes.DataLoss {
				t.Fatal(err)
			}
			if n := w.count(); n != 2*tc.want {
				t.Errorf("%d failures after a stream, want %d", n, 2*tc.want)
			}
		})
	}
}

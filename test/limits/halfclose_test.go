package limits

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	_ "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb" // registers the service
	_ "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"         // registers the service
	"golang.org/x/net/http2"
	_ "google.golang.org/grpc/health/grpc_health_v1" // registers the service
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// openCall is a call whose client does not half-close the stream.
type openCall struct {
	method  string
	message []byte
	later   string // what the client sends after the message
	named   bool   // the message is a name that nobody has used before
}

// openCalls are the unary calls of every service, with an empty request, and some that do
// something, on a key under a rule and on one that is not.
func openCalls(t *testing.T) (all []openCall) {
	t.Helper()
	for _, name := range []protoreflect.FullName{
		"etcdserverpb.KV", "etcdserverpb.Lease", "etcdserverpb.Cluster", "etcdserverpb.Maintenance", "etcdserverpb.Auth",
		"v3electionpb.Election", "v3lockpb.Lock", "grpc.health.v1.Health",
	} {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
		if err != nil {
			t.Fatal(err)
		}
		methods := found.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			if m := methods.Get(i); !m.IsStreamingClient() && !m.IsStreamingServer() {
				c := openCall{method: fmt.Sprintf("/%s/%s", name, m.Name())}
				switch m.Name() {
				case "Compact":
					// a revision to come, at each time
					c.message = []byte("\x08\xff\xff\xff\xff\x0f")
				case "Campaign", "Leader", "Lock":
					c.named = true
				}
				all = append(all, c)
			}
		}
	}
	for _, prefix := range []string{"/ruled/", "/free/"} {
		key := []byte(prefix + "key")
		for method, request := range map[string]proto.Message{
			"/etcdserverpb.KV/Put":             &pb.PutRequest{Key: key, Value: []byte("value")},
			"/etcdserverpb.KV/Range":           &pb.RangeRequest{Key: key},
			"/etcdserverpb.Lease/LeaseGrant":   &pb.LeaseGrantRequest{TTL: 60},
			"/etcdserverpb.Maintenance/Status": &pb.StatusRequest{},
		} {
			message, err := proto.Marshal(request)
			if err != nil {
				t.Fatal(err)
			}
			for _, later := range []string{"", "x", "\x00\x00\x00\x00\x00", strings.Repeat("x", 10_000)} {
				all = append(all, openCall{method: method, message: message, later: later})
			}
		}
	}
	return all
}

// ends sends the call and returns how the server answers: the messages, the status, and that the
// connection is open after it.
func (c openCall) ends(k *frameClient) (result []string) {
	k.heard = nil
	if c.named {
		c.message = append([]byte{0x0a, 16}, rand.Text()[:16]...)
	}
	_ = k.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: k.block(call(c.method)...), EndHeaders: true})
	_ = k.WriteData(1, false, message(0, c.message))
	if c.later != "" {
		_ = k.WriteData(1, false, []byte(c.later))
	}
	answered := func() bool {
		return slices.ContainsFunc(k.heard, func(s string) bool { return strings.Contains(s, "grpc-status: ") })
	}
	if k.listenUntil(30*time.Second, answered); !answered() {
		return []string{"no answer"}
	}
	_ = k.WriteData(1, true, nil) // the client half-closes at last
	end := last(k.settled())
	for _, h := range append(k.heard, end...) {
		_, status, ends := strings.Cut(h, "grpc-status: ")
		code, _, _ := strings.Cut(status, ",")
		switch {
		case ends:
			result = append(result, "status "+code)
		case h == "RST_STREAM 1 STREAM_CLOSED":
			// net/http says so, if what is sent later comes after the answer
		case !strings.HasPrefix(h, "HEADERS"):
			result = append(result, h)
		}
	}
	return slices.Compact(result)
}

// TestNoHalfClose: a unary call is answered when its message is there, whether or not the client
// half-closes the stream, and what the client sends after that changes nothing.
func TestNoHalfClose(t *testing.T) {
	t.Parallel()
	calls := openCalls(t)
	if len(calls) < 60 {
		t.Fatalf("there are %d calls", len(calls))
	}
	for _, w := range transports(t) {
		t.Run(w.name, func(t *testing.T) {
			for _, c := range calls {
				want := c.ends(w.greet(t, w.etcd))
				for name, address := range w.proxies {
					got := c.ends(w.greet(t, address))
					if !slices.Equal(got, want) {
						t.Errorf("%s, %q and then %d bytes:\nbare etcd: %q\n%s: %q", c.method, c.message, len(c.later), want, name, got)
					}
				}
			}
		})
	}
}

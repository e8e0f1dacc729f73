package proxy

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// flagging is an etcd that answers each call with a message as it should be and one with a flag
// that nobody requested.
type flagging struct{ *proxytest.RawEtcd }

func (f *flagging) Data(s *http2conn.Stream, _ []byte, _ bool) {
	s.Data(false, rpc.Header(2), []byte{0x0a, 0x00}) // an empty field 1
	s.Data(false, []byte{1, 0, 0, 0, 2}, []byte{0x0a, 0x00})
}

// TestCompressedAnswerIsRefused: an answer that is compressed although nobody requested it ends the
// call, also after others that were inspected, and nothing else.
func TestCompressedAnswerIsRefused(t *testing.T) {
	address := proxytest.ServeH2(t, func(r *proxytest.RawEtcd) http2conn.Handler { return &flagging{r} })
	conn := startProxy(t, address, everything, nil).dial(t)
	for range 2 {
		s, err := pb.NewKVClient(conn).RangeStream(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")})
		for err == nil {
			_, err = s.Recv()
		}
		if status.Code(err) != codes.Internal {
			t.Errorf("the stream ends with %v", err)
		}
	}
}

package proxy

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// breaking is an etcd that goes in the middle of every answer.
type breaking struct {
	*proxytest.RawEtcd
	gone bool
}

func (b *breaking) Data(s *http2conn.Stream, _ []byte, end bool) {
	if end {
		part := make([]byte, 10_000)
		copy(part, "\x12\x9c\x9c\x01") // a key of 19,996 bytes, with its value
		s.Data(false, rpc.Header(20_000), part)
		b.gone = true
	}
}
func (b *breaking) FlushNeeded() {
	if b.Conn.Flush(); b.gone {
		b.Conn.Close()
	}
}

// TestEtcdGoesAmidAnAnswer: clients repeat what is Unavailable, and a message that is cut off is
// Internal to them, whatever the trailer says.
func TestEtcdGoesAmidAnAnswer(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		address := proxytest.ServeH2(t, func(r *proxytest.RawEtcd) http2conn.Handler { return &breaking{RawEtcd: r} })
		for name, rules := range map[string][]etcdapi.Rule{"under a rule": everything, "under none": nil} {
			conn := startProxy(t, address, rules, nil).dial(t)
			for range 2 {
				_, err := pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")})
				if status.Code(err) != codes.Unavailable {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
	})
}

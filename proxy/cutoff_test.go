package proxy

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// breaking is an etcd that goes in the middle of every answer.
type breaking struct {
	*rawEtcd
	gone bool
}

func (b *breaking) Data(s *http2conn.Stream, _ []byte, end bool) {
	if end {
		s.Data(false, head(20_000), make([]byte, 10_000))
		b.gone = true
	}
}
func (b *breaking) FlushNeeded() {
	if b.conn.Flush(); b.gone {
		b.conn.Close()
	}
}

// TestEtcdGoesAmidAnAnswer: clients repeat what is Unavailable, and a message that is cut off is Internal to them, whatever the trailer says.
func TestEtcdGoesAmidAnAnswer(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		address := serveH2(t, func(r *rawEtcd) http2conn.Handler { return &breaking{rawEtcd: r} })
		for name, rules := range map[string][]Rule{"under a rule": everything, "under none": nil} {
			conn := startProxy(t, address, rules, nil).dial(t)
			for range 2 {
				_, err := pb.NewKVClient(conn).Range(testContext(t), &pb.RangeRequest{Key: []byte("k")})
				if status.Code(err) != codes.Unavailable {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
	})
}

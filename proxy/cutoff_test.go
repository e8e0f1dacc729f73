package proxy

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/h2"
)

// breaking is an etcd that goes in the middle of every answer.
type breaking struct {
	conn *h2.Conn
	gone bool
}

func (b *breaking) Headers(s *h2.Stream, _ []hpack.HeaderField, _ bool) {
	s.Headers([]hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: contentType}}, false)
}
func (b *breaking) Data(s *h2.Stream, _ []byte, end bool) {
	if end {
		s.Data(false, head(20_000), make([]byte, 10_000))
		b.gone = true
	}
}
func (b *breaking) Reset(*h2.Stream, http2.ErrCode) {}
func (b *breaking) Sent(*h2.Stream)                 {}
func (b *breaking) Greeted()                        {}
func (b *breaking) Leaving()                        {}
func (b *breaking) Idle() {
	if b.conn.Flush(); b.gone {
		b.conn.Close()
	}
}

// TestEtcdGoesAmidAnAnswer: clients repeat what is Unavailable, and a message that is cut off is Internal to them, whatever the trailer says.
func TestEtcdGoesAmidAnAnswer(t *testing.T) {
	engines(t, func(t *testing.T, edit func(*Config)) {
		l := listenLoopback(t)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				b := new(breaking)
				b.conn = h2.NewServer(conn, h2.Config{Handler: b, Pool: buffers})
				go func() { _ = b.conn.Serve() }()
			}
		}()
		for name, rules := range map[string][]Rule{"under a rule": everything, "under none": nil} {
			conn := startProxy(t, l.Addr().String(), rules, edit).dial(t)
			for range 2 {
				_, err := pb.NewKVClient(conn).Range(testContext(t), &pb.RangeRequest{Key: []byte("k")})
				if status.Code(err) != codes.Unavailable {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
	})
}

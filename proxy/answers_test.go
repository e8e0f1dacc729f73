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

// flagging is an etcd that answers each call with a message as it should be and one with a flag that nobody asked for.
type flagging struct{ conn *h2.Conn }

func (f *flagging) Headers(s *h2.Stream, _ []hpack.HeaderField, _ bool) {
	s.Headers([]hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: contentType}}, false)
}
func (f *flagging) Data(s *h2.Stream, _ []byte, _ bool) {
	s.Data(false, head(2), []byte{0x0a, 0x00}) // an empty field 1
	s.Data(false, []byte{1, 0, 0, 0, 2}, []byte{0x0a, 0x00})
}
func (f *flagging) Reset(*h2.Stream, http2.ErrCode) {}
func (f *flagging) Sent(*h2.Stream)                 {}
func (f *flagging) Greeted()                        {}
func (f *flagging) Leaving()                        {}
func (f *flagging) Idle()                           { f.conn.Flush() }

// TestCompressedAnswerIsRefused: an answer that is compressed although nobody asked for it ends the call, also after others that were looked into, and nothing else.
func TestCompressedAnswerIsRefused(t *testing.T) {
	l := listenLoopback(t)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f := new(flagging)
			f.conn = h2.NewServer(conn, h2.Config{Handler: f, Pool: buffers})
			go func() { _ = f.conn.Serve() }()
		}
	}()
	conn := startProxy(t, l.Addr().String(), everything, func(c *Config) { c.Reference = false }).dial(t)
	for range 2 {
		s, err := pb.NewKVClient(conn).RangeStream(testContext(t), &pb.RangeRequest{Key: []byte("k")})
		for err == nil {
			_, err = s.Recv()
		}
		if status.Code(err) != codes.Internal {
			t.Errorf("the stream ends with %v", err)
		}
	}
}

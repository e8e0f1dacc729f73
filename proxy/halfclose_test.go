package proxy

import (
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// TestNoHalfClose: a unary call whose client does not half-close the stream is answered once its
// message is there, in however many frames that came, and what comes after the message is ignored.
func TestNoHalfClose(t *testing.T) {
	etcd := proxytest.ServeStore(t, "ruled/a", "free/a")
	bothWays(t, func(t *testing.T, startProxy starter) {
		for name, sealer := range map[string]etcdapi.Sealer{"without the KMS": proxytest.Reverser{}, "with the KMS": proxytest.Unhurried{}} {
			c := proxytest.NewTalker(t, startProxy(t, etcd, []etcdapi.Rule{{Prefix: "ruled/", Sealer: sealer}}, nil).Addrs()[0].String())
			for _, key := range []string{"ruled/a", "free/a"} {
				for method, request := range map[string]proto.Message{
					"Range":   &pb.RangeRequest{Key: []byte(key)},
					"ByValue": &pb.RangeRequest{Key: []byte(key), SortTarget: pb.RangeRequest_VALUE, RangeEnd: []byte("z")},
					"Put":     &pb.PutRequest{Key: []byte(key), Value: []byte("v")},
				} {
					msg, err := proto.Marshal(request)
					if err != nil {
						t.Fatal(err)
					}
					raw := append(rpc.Header(len(msg)), msg...)
					var single [][]byte
					for _, b := range raw {
						single = append(single, []byte{b})
					}
					for how, frames := range map[string][][]byte{
						"in one frame":                {raw},
						"in two frames":               {raw[:7], raw[7:]},
						"in frames of a byte":         single,
						"and an empty frame":          {raw, nil},
						"and another message":         {raw, raw},
						"and another message at once": {slices.Concat(raw, raw)},
						"and half a head":             {raw, []byte("\x00\x00")},
						"and garbage":                 {raw, []byte(strings.Repeat("\xff", 10_000))},
					} {
						a := proxytest.Attempt{Open: true, Frames: frames, Padded: make([]bool, len(frames)), Fields: []hpack.HeaderField{
							{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/etcdserverpb.KV/" + strings.Replace(method, "ByValue", "Range", 1)},
							{Name: ":authority", Value: "x"}, {Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
						}}
						if got := c.Try(t, a); !slices.Contains(got.Trailer, "grpc-status: 0") || len(got.Data) == 0 {
							t.Errorf("%s of %s %s, %s: %q", method, key, name, how, got)
						}
					}
				}
			}
		}
	})
}

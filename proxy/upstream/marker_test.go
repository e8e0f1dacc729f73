package upstream

import (
	"crypto/rand"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// TestLooksForProxy: the question whether there is a proxy is told from every other read, of keys
// below the same prefix, too.
func TestLooksForProxy(t *testing.T) {
	if n := len(rand.Text()); n != probeRandom {
		t.Fatalf("random text has %d characters", n)
	}
	probe := proxyProbe + rand.Text()
	for name, tt := range map[string]struct {
		request *pb.RangeRequest
		want    bool
	}{
		"the question":       {&pb.RangeRequest{Key: []byte(probe), Serializable: true, CountOnly: true}, true},
		"below a namespace":  {&pb.RangeRequest{Key: []byte("/space" + probe)}, true},
		"a key":              {&pb.RangeRequest{Key: []byte("/registry/secrets/a")}, false},
		"an empty key":       {&pb.RangeRequest{}, false},
		"the prefix":         {&pb.RangeRequest{Key: []byte(proxyProbe)}, false},
		"longer":             {&pb.RangeRequest{Key: []byte(probe + "x")}, false},
		"a range":            {&pb.RangeRequest{Key: []byte(probe), RangeEnd: []byte(probe + "x")}, false},
		"the end of a range": {&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte(probe)}, false},
	} {
		msg, err := proto.Marshal(tt.request)
		if err != nil {
			t.Fatal(err)
		}
		if got := IsProbe(msg); got != tt.want {
			t.Errorf("%s: %t, want %t", name, got, tt.want)
		}
	}
	if IsProbe([]byte("\xff" + probe)) {
		t.Error("what is no message is taken for the question")
	}
}

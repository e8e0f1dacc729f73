package limits

import (
	"bufio"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

func encoded(m proto.Message) ([]byte, error) { return proto.Marshal(m) }

// fill puts n values below a prefix.
func fill(t *testing.T, kv pb.KVClient, prefix string, n int, value []byte) {
	t.Helper()
	for i := range n {
		if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: fmt.Appendf(nil, "%s%06d", prefix, i), Value: value}); err != nil {
			t.Fatal(err)
		}
	}
}

// scrape reads one series without labels of an etcd's metrics.
func scrape(t *testing.T, url, name string) float64 {
	t.Helper()
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get(url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s has no metric %s", url, name)
	return 0
}

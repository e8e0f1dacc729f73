package lifecycle

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestStatusMemory checks that the memory that status needs does not grow with the number of keys;
// STATUS_KEYS=1000000 uses a million.
func TestStatusMemory(t *testing.T) {
	t.Parallel()
	const most = 60 << 20
	if runtime.GOOS != "linux" {
		t.Skip("the peak is of the kernel's own counting, whose meaning differs elsewhere")
	}
	n := 100_000
	if testing.Short() {
		n = 20_000
	}
	if text := os.Getenv("STATUS_KEYS"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			t.Fatalf("STATUS_KEYS: %v", err)
		}
	}
	s := newSite(t, "3.7", nil)
	for at := 0; at < n; at += 100 {
		var puts []*pb.RequestOp
		for i := at; i < min(at+100, n); i++ {
			put := &pb.PutRequest{Key: fmt.Appendf(nil, "%sns-%d/secret-%07d", prefix, i%50, i), Value: []byte(s.Sealed.Value(strconv.Itoa(i)))}
			puts = append(puts, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}})
		}
		if _, err := s.kv.Txn(t.Context(), &pb.TxnRequest{Success: puts}); err != nil {
			t.Fatal(err)
		}
	}
	begun := time.Now()
	p := s.Spawn("status", "status", "--config", s.proxy.ConfigFile, "--output", "json")
	peak := p.Peak()
	if code := p.Wait(10 * time.Minute); code != 0 {
		t.Fatalf("exit code %d: %s", code, p.Log())
	}
	var report struct {
		Rules []struct{ Keys int }
	}
	if err := json.Unmarshal([]byte(p.Log()), &report); err != nil || len(report.Rules) != 1 || report.Rules[0].Keys != n {
		t.Errorf("%v, %+v, want %d keys", err, report, n)
	}
	t.Logf("%d keys: %.1f s, %d MiB at most", n, time.Since(begun).Seconds(), peak>>20)
	if peak > most || peak == 0 {
		t.Errorf("status took %d MiB, more than %d", peak>>20, most>>20)
	}
}

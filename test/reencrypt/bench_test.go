package reencrypt

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// BenchmarkReencrypt re-encrypts 100,000 values of 1 KiB (5,000 with -short), and does the same
// with a loop that gets and puts each value through the proxy, as clients would. It reports values
// per second, and CPU time of etcd per value. Run it with -benchtime 1x.
func BenchmarkReencrypt(b *testing.B) {
	n := 100_000
	if testing.Short() {
		n = 5000
	}
	for _, fsync := range []bool{false, true} {
		s, etcd := newSite(b, harness.EtcdConfig{Flags: []string{fmt.Sprintf("--unsafe-no-fsync=%v", !fsync), "--quota-backend-bytes", "8589934592", "--log-level", "error"}})
		config := s.config("run", s.cfg)
		s.load(n)
		p := s.StartProxy("proxy", s.cfg)
		p.WaitReady(within)
		through := harness.Dial(b, p.Address, nil)
		for _, run := range []struct {
			name string
			do   func() float64
		}{
			{"reencrypt", func() float64 { return s.timed(config, n) }},
			{"reencrypt-workers=16", func() float64 { return s.timed(config, n, "--workers", "16") }},
			{"reencrypt-txn-keys=100", func() float64 { return s.timed(config, n, "--txn-keys", "100") }},
			{"naive", func() float64 { return s.naive(through, n, 1) }},
			{"naive-clients=16", func() float64 { return s.naive(through, n, 16) }},
		} {
			b.Run(fmt.Sprintf("fsync=%v/%s", fsync, run.name), func(b *testing.B) {
				for range b.N {
					s.compact()
					s.kms.Rotate()
					harness.Eventually(b, within, "the proxy to seal under the new key", func() error {
						if !strings.Contains(p.Log(), `"keyID":"`+s.kms.KeyID()+`","keyIDAsStatus"`) {
							return fmt.Errorf("not yet")
						}
						return nil
					})
					cpu := cpuOf(b, etcd.PID())
					seconds := run.do()
					b.ReportMetric(float64(n)/seconds, "values/s")
					b.ReportMetric((cpuOf(b, etcd.PID())-cpu)/float64(n)*1e6, "etcd-cpu-µs/value")
					b.ReportMetric(0, "ns/op")
				}
			})
		}
	}
}

// load puts n plaintext values of 1 KiB.
func (s *site) load(n int) {
	s.t.Helper()
	for at := 0; at < n; at += 100 {
		var puts []*pb.RequestOp
		for i := at; i < min(at+100, n); i++ {
			put := &pb.PutRequest{Key: fmt.Appendf(nil, "%s%06d", prefix, i), Value: bytes.Repeat([]byte{byte(i)}, 1<<10)}
			puts = append(puts, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}})
		}
		if _, err := s.kv.Txn(s.t.Context(), &pb.TxnRequest{Success: puts}); err != nil {
			s.t.Fatal(err)
		}
	}
}

// timed runs the command, with its plan and its final check, and returns the elapsed time.
func (s *site) timed(config string, n int, args ...string) float64 {
	s.t.Helper()
	begun := time.Now()
	p := s.Spawn("bench", append([]string{"reencrypt", "--config", config, "--ignore-proxies"}, args...)...)
	if code := p.Wait(time.Hour); code != 0 || !strings.Contains(p.Log(), fmt.Sprintf(": %d rewritten", n)) {
		s.t.Fatalf("exit code %d: %s", code, p.Log())
	}
	return time.Since(begun).Seconds()
}

// naive gets and puts each value through the proxy.
func (s *site) naive(through *grpc.ClientConn, n, clients int) float64 {
	s.t.Helper()
	kv := pb.NewKVClient(through)
	begun := time.Now()
	var all sync.WaitGroup
	for c := range clients {
		all.Go(func() {
			for i := c; i < n; i += clients {
				key := fmt.Appendf(nil, "%s%06d", prefix, i)
				r, err := kv.Range(context.Background(), &pb.RangeRequest{Key: key})
				if err == nil {
					_, err = kv.Put(context.Background(), &pb.PutRequest{Key: key, Value: r.Kvs[0].Value})
				}
				if err != nil {
					s.t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	return time.Since(begun).Seconds()
}

// compact gives each run the same history: none.
func (s *site) compact() {
	s.t.Helper()
	now, err := s.kv.Range(s.t.Context(), &pb.RangeRequest{Key: []byte(prefix)})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.kv.Compact(s.t.Context(), &pb.CompactionRequest{Revision: now.Header.Revision, Physical: true}); err != nil {
		s.t.Log(err) // the same revision as before
	}
	if _, err := pb.NewMaintenanceClient(s.conn).Defragment(s.t.Context(), &pb.DefragmentRequest{}); err != nil {
		s.t.Fatal(err)
	}
}

// cpuOf returns the CPU time of a process in seconds.
func cpuOf(b *testing.B, pid int) float64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Skip("needs Linux's /proc")
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	fields := strings.Fields(rest)
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) / 100
}

package limits

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestFileLimit: a proxy that may open no more files serves those who are connected, says in its
// log what is wrong, not more than once a second, and takes in those who wait as soon as others
// leave.
func TestFileLimit(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, nil)
	connected := pb.NewKVClient(harness.Dial(t, s.proxy.Address, nil))
	value := s.env.Sealed.Value("files")
	if err := once(connected, "/files", value); err != nil {
		t.Fatal(err)
	}
	limit := syscall.Rlimit{Cur: 64, Max: 64}
	const rlimitNoFile = 7 // syscall.RLIMIT_NOFILE
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(s.proxy.PID()), rlimitNoFile, uintptr(unsafe.Pointer(&limit)), 0, 0, 0); errno != 0 {
		t.Fatalf("lower the proxy's limit: %v", errno)
	}
	var crowd []net.Conn
	for range 100 {
		c, err := net.Dial("tcp", s.proxy.Address) // the system accepts it, the proxy does not
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		crowd = append(crowd, c)
	}
	harness.Eventually(t, 10*time.Second, "the proxy to say so", func() error {
		if !strings.Contains(s.proxy.Log(), "connections cannot be accepted") {
			return fmt.Errorf("its log does not")
		}
		return nil
	})
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		if err := once(connected, "/files", value); err != nil {
			t.Fatalf("who was connected: %v", err)
		}
	}
	if n := strings.Count(s.proxy.Log(), "connections cannot be accepted"); n > 20 {
		t.Errorf("it says so %d times", n)
	}
	for _, c := range crowd {
		c.Close()
	}
	begun := time.Now()
	if err := once(pb.NewKVClient(harness.Dial(t, s.proxy.Address, nil)), "/files", value); err != nil {
		t.Errorf("who comes when there is room: %v", err)
	}
	t.Logf("served %v after the crowd had left", time.Since(begun).Round(time.Millisecond))
}

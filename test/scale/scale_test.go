// Package scale puts large numbers before the proxy: thousands of client connections with a watch
// each, a million values, a hundred proxies of one etcd. It checks that nothing is lost and what
// each of them costs.
//
// SCALE_CONNECTIONS, SCALE_VALUES and SCALE_PROXIES are the numbers, and SCALE_TIME is how long the
// watches receive events. Without them, the numbers are smaller, and smaller still with -short.
package scale

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	within = 2 * time.Minute
	prefix = "/s/"
)

// size returns the number in an environment variable, or the default of this form of the test.
func size(t *testing.T, variable string, usual, short int) int {
	t.Helper()
	if text := os.Getenv(variable); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			t.Fatalf("%s: %q is not a number of at least 1", variable, text)
		}
		return n
	}
	if testing.Short() {
		return short
	}
	return usual
}

// files permits this process, and those that it starts, to open n files.
func files(t *testing.T, n int) {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	want := syscall.Rlimit{Cur: max(limit.Cur, uint64(n)), Max: max(limit.Max, uint64(n))}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &want); err != nil {
		t.Skipf("%d files have to be open in one process, and this user may open %d (%v): run it as root, or raise the hard limit (ulimit -Hn)", n, limit.Max, err)
	}
}

// usage is what a process uses.
type usage struct {
	resident          int64 // bytes
	goroutines, files int
}

func (u usage) String() string {
	return fmt.Sprintf("%d MiB, %d goroutines, %d files", u.resident>>20, u.goroutines, u.files)
}

var metric = regexp.MustCompile(`(?m)^(go_goroutines|process_resident_memory_bytes|process_open_fds) (\S+)$`)

// use returns what a proxy uses.
func use(t *testing.T, p *harness.Proxy) (u usage) {
	t.Helper()
	found := metric.FindAllStringSubmatch(p.Scrape(), -1)
	if len(found) != 3 {
		t.Fatalf("the metrics have %d of the 3 figures", len(found))
	}
	for _, m := range found {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		switch m[1] {
		case "go_goroutines":
			u.goroutines = int(v)
		case "process_open_fds":
			u.files = int(v)
		default:
			u.resident = int64(v)
		}
	}
	return u
}

// peak returns the most memory that a process has used, in bytes.
func peak(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// counter returns the sum of a counter of etcd's metrics.
func counter(t *testing.T, etcd *harness.Etcd, name string) (sum float64) {
	t.Helper()
	for line := range strings.Lines(get(t, etcd.URL+"/metrics")) {
		if !strings.HasPrefix(line, name+" ") && !strings.HasPrefix(line, name+"{") {
			continue
		}
		words := strings.Fields(line)
		v, err := strconv.ParseFloat(words[len(words)-1], 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += v
	}
	return sum
}

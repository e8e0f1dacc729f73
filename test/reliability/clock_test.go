package reliability

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// clockVariable names the file with the seconds that a proxy's clock is ahead.
const clockVariable = "RELIABILITY_CLOCK"

// movable is added to the standard library's package time. As with a real clock that is set, only
// the time of day changes, and not the monotonic clock.
const movable = `package time

import (
	"sync/atomic"
	"syscall"
)

var moved atomic.Int64 // seconds

func init() {
	path, ok := syscall.Getenv("` + clockVariable + `")
	if !ok {
		return
	}
	go func() {
		for ; ; Sleep(20 * Millisecond) {
			file, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			var text [16]byte
			n, _ := syscall.Read(file, text[:])
			syscall.Close(file)
			if n < 2 || text[n-1] != '\n' {
				continue
			}
			seconds, digits := int64(0), text[:n-1]
			if digits[0] == '-' {
				digits = digits[1:]
			}
			for _, d := range digits {
				seconds = seconds*10 + int64(d-'0')
			}
			if text[0] == '-' {
				seconds = -seconds
			}
			moved.Store(seconds)
		}
	}()
}
`

// buildClock builds the proxy with a clock that can be moved while it runs, and returns its path.
// libfaketime cannot move it: a Go program asks the kernel and not the C library for the time. So
// the standard library is changed at build time; the code of the proxy is the same.
func (s *site) buildClock() string {
	s.t.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		s.t.Fatal(err)
	}
	source := filepath.Join(strings.TrimSpace(string(root)), "src", "time")
	text, err := os.ReadFile(filepath.Join(source, "time.go"))
	if err != nil {
		s.t.Fatal(err)
	}
	const now = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	if strings.Count(string(text), now) != 1 {
		s.t.Fatalf("time.Now of %s has another form than expected", strings.TrimSpace(string(root)))
	}
	// In a folder that stays, so that the next build finds its results.
	dir := filepath.Join(harness.BinDir(s.t), "clock")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			s.t.Fatal(err)
		}
		return path
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(source, "time.go"):  file("time.go", strings.Replace(string(text), now, now+"\tsec += moved.Load()\n", 1)),
		filepath.Join(source, "moved.go"): file("moved.go", movable),
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	binary := filepath.Join(dir, "etcd-kms-proxy")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-overlay", file("overlay.json", string(overlay)), "-o", binary, "./cmd/etcd-kms-proxy")
	build.Dir, build.Env = filepath.Join("..", ".."), append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	begun := time.Now()
	if out, err := build.CombinedOutput(); err != nil {
		s.t.Fatalf("build a proxy with a clock that can be moved: %v\n%s", err, out)
	}
	s.t.Logf("built a proxy with a clock that can be moved within %v", time.Since(begun).Round(time.Second))
	s.clockFile = s.File("clock", []byte("0\n"))
	s.ProxyEnv = append(s.ProxyEnv, clockVariable+"="+s.clockFile)
	return binary
}

func clocks(s *site) string {
	if s.clockFile == "" {
		return "they need a build of the standard library, which takes minutes, and which only RELIABILITY asks for"
	}
	return ""
}

// moveClock moves the clock of one proxy. The returned function sets it right, and checks that the
// proxy had noticed.
func (s *site) moveClock(by time.Duration) func() {
	s.t.Helper()
	p := s.proxies[1]
	set := func(by time.Duration) {
		s.File("clock", fmt.Appendf(nil, "%d\n", int(by.Seconds())))
		harness.Eventually(s.t, within, "the proxy's clock to be moved", func() error {
			// The admin server sends the time with each response.
			date, err := dateOf("http://" + p.Config.Admin.Address + "/livez")
			if err != nil {
				return err
			}
			if off := time.Until(date) - by; off.Abs() > 10*time.Second {
				return fmt.Errorf("it is off by %v", off)
			}
			return nil
		})
	}
	set(by)
	return func() { set(0) }
}

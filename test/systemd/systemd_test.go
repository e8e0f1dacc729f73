// Package systemd tests the units of deploy/systemd, and `serve` with the features of systemd:
// passed sockets, notifications and the watchdog. systemd-analyze checks the units,
// systemd-socket-activate holds the sockets, and a systemd that boots in namespaces runs the
// service.
package systemd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const within = 30 * time.Second

// program returns the path of a program of Debian's package systemd.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil && os.Getenv("CI") != "" {
		t.Fatalf("%s is not installed (package systemd)", name)
	} else if err != nil {
		t.Skipf("%s is not installed (package systemd)", name)
	}
	return path
}

// units copies the units to a folder, with the binary that was built in place of the installed one.
func units(t *testing.T) (folder string, texts map[string]string) {
	t.Helper()
	folder, texts = t.TempDir(), make(map[string]string)
	for _, name := range []string{"etcd-kms-proxy.service", "etcd-kms-proxy.socket"} {
		data, err := os.ReadFile(filepath.Join("..", "..", "deploy", "systemd", name))
		if err != nil {
			t.Fatal(err)
		}
		texts[name] = string(data)
		text := strings.ReplaceAll(texts[name], "/usr/bin/etcd-kms-proxy", harness.Bin(t, "etcd-kms-proxy"))
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return folder, texts
}

// TestUnits checks that systemd finds nothing wrong with the units, and that the exposure of the
// service is low.
func TestUnits(t *testing.T) {
	analyze := program(t, "systemd-analyze")
	folder, texts := units(t)
	service, socket := filepath.Join(folder, "etcd-kms-proxy.service"), filepath.Join(folder, "etcd-kms-proxy.socket")
	if out, err := exec.Command(analyze, "--man=no", "verify", service, socket).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("verify: %v\n%s", err, out)
	}
	// 20 is an exposure of 2.0, the end of "OK".
	out, err := exec.Command(analyze, "--no-pager", "security", "--offline=true", "--threshold=20", service).CombinedOutput()
	level := regexp.MustCompile(`Overall exposure level .*: ([0-9.]+) OK`).FindSubmatch(out)
	if err != nil || level == nil {
		t.Errorf("security: %v\n%s", err, out)
	} else {
		t.Logf("exposure %s", level[1])
	}
	for _, line := range []string{
		"Type=notify", "WatchdogSec=30s", "RuntimeDirectoryPreserve=yes", "Wants=network-online.target", "After=network-online.target etcd.service",
		"LimitCORE=0", "MemoryMax=1G", "MemorySwapMax=0", "LoadCredential=keys:/etc/etcd-kms-proxy/keys", "ConfigurationDirectory=etcd-kms-proxy/keys",
	} {
		if !strings.Contains(texts["etcd-kms-proxy.service"], "\n"+line+"\n") {
			t.Errorf("the service has no %s", line)
		}
	}
}

// notifications is the socket for a service's notifications to systemd.
type notifications struct {
	path string
	mu   sync.Mutex
	got  []string
}

func listenNotifications(t *testing.T, e *harness.Env) *notifications {
	t.Helper()
	n := &notifications{path: filepath.Join(e.Dir, "notify.sock")}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: n.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 4096)
		for {
			size, err := conn.Read(buffer)
			if err != nil {
				return
			}
			n.mu.Lock()
			for line := range strings.Lines(string(buffer[:size])) {
				n.got = append(n.got, strings.TrimSpace(line))
			}
			n.mu.Unlock()
		}
	}()
	t.Cleanup(func() { _ = conn.Close(); <-done })
	return n
}

func (n *notifications) count(state string) (count int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.got {
		if s == state {
			count++
		}
	}
	return count
}

func (n *notifications) wait(t *testing.T, state string, count int) {
	t.Helper()
	harness.Eventually(t, within, state, func() error {
		if got := n.count(state); got < count {
			return fmt.Errorf("%d of %d", got, count)
		}
		return nil
	})
}

// TestRestart restarts the service several times while systemd-socket-activate holds the socket and
// clients send calls. No connection may be refused, no call may fail, and each start and stop must
// be notified.
func TestRestart(t *testing.T) {
	activate := program(t, "systemd-socket-activate")
	e := harness.New(t)
	etcd := e.StartEtcd(harness.EtcdConfig{})
	socket := filepath.Join(e.Dir, "etcd.sock")
	p := e.NewProxy("proxy", harness.ProxyConfig{
		Listeners: []harness.Listener{{Address: "systemd://etcd"}}, Etcd: harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS: []harness.KMSConfig{e.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
	})
	n := listenNotifications(t, e)
	// The shell keeps the socket, as systemd does, and starts the service again whenever it ends.
	stop, pidFile := filepath.Join(e.Dir, "stop"), filepath.Join(e.Dir, "pid")
	cmd := exec.Command(activate, "--listen="+socket, "--fdname=etcd", "--setenv=NOTIFY_SOCKET="+n.path, "--setenv=WATCHDOG_USEC=400000",
		"sh", "-c", `while [ ! -e "$0" ]; do sh -c 'echo $$ >"$0.new"; mv "$0.new" "$0"; export LISTEN_PID=$$; exec "$1" serve --config "$2"' "$@"; done`,
		stop, pidFile, harness.Bin(t, "etcd-kms-proxy"), p.ConfigFile)
	log, err := os.Create(filepath.Join(e.Dir, "service.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // no process remains after a success
		_ = cmd.Wait()
		if data, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("%s", data)
		} else if found := e.Sealed.Search("the service's log", data); len(found) > 0 {
			t.Error(found)
		}
	})
	// The file of a socket is there before the socket listens.
	harness.Eventually(t, within, "the socket", func() error {
		conn, err := net.DialTimeout("unix", socket, within)
		if err == nil {
			err = conn.Close()
		}
		return err
	})

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var work sync.WaitGroup
	var calls, connections atomic.Int64
	var failures sync.Map
	for id := range 4 {
		kv := pb.NewKVClient(harness.Dial(t, "unix://"+socket, nil))
		work.Go(func() { // calls on a connection
			for i := 0; ctx.Err() == nil; i++ {
				asking, done := context.WithTimeout(context.WithoutCancel(ctx), within)
				_, err := kv.Put(asking, &pb.PutRequest{Key: fmt.Appendf(nil, "/s/%d-%d", id, i%100), Value: []byte(e.Sealed.Value("restart"))})
				done()
				if err != nil {
					failures.Store("call: "+err.Error(), true)
				}
				calls.Add(1)
			}
		})
		work.Go(func() { // new connections
			for ctx.Err() == nil {
				conn, err := net.DialTimeout("unix", socket, within)
				if err != nil {
					failures.Store("connection: "+err.Error(), true)
					continue
				}
				_ = conn.Close()
				connections.Add(1)
				time.Sleep(time.Millisecond) // limits the rate
			}
		})
	}
	const restarts = 5
	for i := range restarts {
		n.wait(t, "READY=1", i+1)
		before := calls.Load()
		harness.Eventually(t, within, "calls to go on", func() error {
			if calls.Load() < before+50 {
				return errors.New("not yet")
			}
			return nil
		})
		if err := syscall.Kill(pidOf(t, pidFile), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	n.wait(t, "READY=1", restarts+1)
	n.wait(t, "WATCHDOG=1", n.count("WATCHDOG=1")+3)
	cancel()
	work.Wait()
	if got := n.count("STOPPING=1"); got != restarts {
		t.Errorf("STOPPING=1 was notified %d times, want %d", got, restarts)
	}
	failures.Range(func(what, _ any) bool { t.Error(what); return true })
	t.Logf("%d calls and %d connections over %d restarts", calls.Load(), connections.Load(), restarts)
	if err := os.WriteFile(stop, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pidOf(t, pidFile), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the service ends with %v", err)
	}
}

func pidOf(t *testing.T, file string) int {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// TestSockets checks that a mismatch between passed sockets and listeners is reported at startup.
func TestSockets(t *testing.T) {
	e := harness.New(t)
	key := e.LocalKey("dev", 1)
	for n, tt := range []struct {
		name, listener string
		network, addr  string // of the socket; empty if none is passed
		texts          []string
	}{
		{"none is passed", "systemd://etcd", "", "", []string{"systemd passes no socket of this name, or any other", "hint: start the socket unit"}},
		{"another name", "systemd://other", "tcp", "127.0.0.1:0", []string{"systemd passes no socket of this name: it passes etcd", "FileDescriptorName=other"}},
		{"nobody takes it", "127.0.0.1:0", "tcp", "127.0.0.1:0", []string{`systemd passes the socket "etcd", and no listener uses it`, "systemd://etcd"}},
		{"in the clear", "systemd://etcd", "tcp", "0.0.0.0:0", []string{"every value would cross the network in plaintext", "hint: add tls with clientCAFile"}},
		{"a datagram socket", "systemd://etcd", "udp", "127.0.0.1:0", []string{"does not accept connections", "hint: write ListenStream="}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := e.NewProxy(fmt.Sprintf("sockets-%d", n), harness.ProxyConfig{
				Listeners: []harness.Listener{{Address: tt.listener}}, Etcd: harness.Upstream{Endpoints: []string{"http://127.0.0.1:1"}}, KMS: []harness.KMSConfig{key},
			})
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			cmd := exec.CommandContext(ctx, "sh", "-c", `export LISTEN_PID=$$; exec "$0" serve --config "$1"`, harness.Bin(t, "etcd-kms-proxy"), p.ConfigFile)
			if tt.network != "" {
				cmd.ExtraFiles = []*os.File{bound(t, tt.network, tt.addr)}
				cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES=etcd")
			}
			out, err := cmd.CombinedOutput()
			if err == nil || cmd.ProcessState.ExitCode() != 3 {
				t.Errorf("it ends with %v, want exit code 3", err)
			}
			for _, text := range tt.texts {
				if !strings.Contains(string(out), text) {
					t.Errorf("no %q in\n%s", text, out)
				}
			}
		})
	}
}

// bound is a bound socket.
func bound(t *testing.T, network, addr string) *os.File {
	t.Helper()
	var socket interface {
		File() (*os.File, error)
		Close() error
	}
	if network == "udp" {
		conn, err := net.ListenPacket(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		socket = conn.(*net.UDPConn)
	} else {
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		socket = l.(*net.TCPListener)
	}
	f, err := socket.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close(); _ = socket.Close() })
	return f
}

// TestSeveralSockets passes two sockets with the same name, which are one listener.
func TestSeveralSockets(t *testing.T) {
	e := harness.New(t)
	etcd := e.StartEtcd(harness.EtcdConfig{})
	p := e.NewProxy("proxy", harness.ProxyConfig{
		Listeners: []harness.Listener{{Address: "systemd://etcd"}}, Etcd: harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS: []harness.KMSConfig{e.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
	})
	cmd := exec.Command("sh", "-c", `export LISTEN_PID=$$; exec "$0" serve --config "$1"`, harness.Bin(t, "etcd-kms-proxy"), p.ConfigFile)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=etcd:etcd")
	var addresses []string
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		addresses, cmd.ExtraFiles = append(addresses, l.Addr().String()), append(cmd.ExtraFiles, f)
	}
	logs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var lines []string
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(logs); s.Scan(); {
			lines = append(lines, s.Text())
		}
	}()
	for i, address := range addresses {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		kv := pb.NewKVClient(harness.Dial(t, address, nil))
		if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("/s/key"), Value: []byte(e.Sealed.Value(strconv.Itoa(i)))}); err != nil {
			t.Errorf("socket %d: %v", i, err)
		}
		cancel()
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-read
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ends with %v\n%s", err, strings.Join(lines, "\n"))
	}
}

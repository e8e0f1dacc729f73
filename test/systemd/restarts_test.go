package systemd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// restartSite is a proxy whose sockets outlive it: one without TLS and one with.
type restartSite struct {
	env           *harness.Env
	etcd          *harness.Etcd
	configs       [2]string // for one proxy and the next: they differ in the address of the admin server
	started       int
	sockets       []*os.File
	plain, secure string // addresses
	tls           *tls.Config
	cert, key, ca string // files of a client
	log           *os.File
}

func newRestartSite(t *testing.T) *restartSite {
	t.Helper()
	e := harness.New(t)
	s := &restartSite{env: e, etcd: e.StartEtcd(harness.EtcdConfig{Flags: []string{"--unsafe-no-fsync"}})}
	ca := e.NewCA("clients")
	server, client := ca.Server("proxy"), ca.Client("client", "client")
	s.tls, s.cert, s.key, s.ca = ca.ClientTLS(client), client.CertFile, client.KeyFile, ca.File
	key := e.LocalKey("dev", 1)
	for i := range s.configs {
		s.configs[i] = e.NewProxy(fmt.Sprint("proxy-", i), harness.ProxyConfig{
			Listeners: []harness.Listener{{Address: "systemd://plain"}, {
				Address: "systemd://secure", TLS: &harness.ServerTLS{CertFile: server.CertFile, KeyFile: server.KeyFile, ClientCAFile: ca.File},
			}},
			Etcd: harness.Upstream{Endpoints: []string{s.etcd.URL}},
			KMS:  []harness.KMSConfig{key}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
		}).ConfigFile
	}
	for _, address := range []*string{&s.plain, &s.secure} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		*address, s.sockets = l.Addr().String(), append(s.sockets, f)
		_ = l.Close() // f is the socket
	}
	var err error
	if s.log, err = os.Create(filepath.Join(e.Dir, "service.log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.log.Close()
		if data, err := os.ReadFile(s.log.Name()); t.Failed() && err == nil {
			t.Logf("%s", data[max(0, len(data)-8<<10):])
		} else if found := e.Sealed.Search("the service's log", data); len(found) > 0 {
			t.Error(found)
		}
	})
	return s
}

// start starts a proxy with the sockets.
func (s *restartSite) start(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", `export LISTEN_PID=$$; exec "$0" serve --config "$1"`, harness.Bin(t, "etcd-kms-proxy"), s.configs[s.started%len(s.configs)])
	s.started++
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = s.sockets, s.log, s.log
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=plain:secure")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

// stop sends SIGTERM, and returns once the proxy has ended.
func (s *restartSite) stop(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	status, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if err != nil && status.Signal() != syscall.SIGTERM { // it had not begun to handle signals
		t.Errorf("the proxy ends with %v", err)
	}
}

// putter puts values under new keys, one after the other, in its own way.
type putter struct {
	name  string
	put   func(ctx context.Context, key, value string) error
	pause time.Duration
	done  int // by its own goroutine
}

func (p *putter) key(i int) string { return fmt.Sprintf("/s/%s/%d", p.name, i) }

// putters are clients of all kinds. None of them repeats a put that has failed.
func (s *restartSite) putters(t *testing.T) []*putter {
	t.Helper()
	overGRPC := func(ctx context.Context, conn *grpc.ClientConn, key, value string) error {
		_, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
		return err
	}
	var all []*putter
	add := func(name string, pause time.Duration, put func(ctx context.Context, key, value string) error) {
		all = append(all, &putter{name: name, put: put, pause: pause})
	}
	for name, to := range map[string]struct {
		address string
		config  *tls.Config
	}{"grpc": {s.plain, nil}, "grpc-tls": {s.secure, s.tls}} {
		conn := harness.Dial(t, to.address, to.config)
		add(name, time.Millisecond, func(ctx context.Context, key, value string) error { return overGRPC(ctx, conn, key, value) })
		add(name+"-once", 5*time.Millisecond, func(ctx context.Context, key, value string) error {
			conn := harness.Dial(t, to.address, to.config)
			defer conn.Close()
			return overGRPC(ctx, conn, key, value)
		})
	}
	for name, transport := range map[string]*http.Transport{
		"http1":      {},
		"http1-once": {DisableKeepAlives: true},
		"https1":     {TLSClientConfig: s.tls.Clone()},
		"https2":     {TLSClientConfig: s.tls.Clone(), ForceAttemptHTTP2: true},
		"https-once": {TLSClientConfig: s.tls.Clone(), DisableKeepAlives: true},
	} {
		t.Cleanup(transport.CloseIdleConnections)
		client, url := http.Client{Transport: transport}, "http://"+s.plain+"/v3/kv/put"
		if transport.TLSClientConfig != nil {
			url = "https://" + s.secure + "/v3/kv/put"
		}
		add(name, 5*time.Millisecond, func(ctx context.Context, key, value string) error {
			body, err := json.Marshal(map[string][]byte{"key": []byte(key), "value": []byte(value)})
			if err != nil {
				return err
			}
			r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
			if err != nil {
				return err
			}
			answer, err := client.Do(r)
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			text, err := io.ReadAll(answer.Body)
			if err != nil || answer.StatusCode != http.StatusOK {
				return fmt.Errorf("%s: %s, %w", answer.Status, text, err)
			}
			return nil
		})
	}
	etcdctl := harness.Bin(t, "etcdctl-3.7")
	for name, flags := range map[string][]string{
		"etcdctl":     {"--endpoints=http://" + s.plain},
		"etcdctl-tls": {"--endpoints=https://" + s.secure, "--cacert=" + s.ca, "--cert=" + s.cert, "--key=" + s.key},
	} {
		add(name, 50*time.Millisecond, func(ctx context.Context, key, value string) error {
			args := append(flags, "--dial-timeout=30s", "--command-timeout=30s", "put", key, value)
			if out, err := exec.CommandContext(ctx, etcdctl, args...).CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	return all
}

// TestRandomRestarts restarts a proxy at random moments, also within its first 50 ms, while clients
// of all kinds put. Sometimes the next proxy starts before the last one ends. Their sockets outlive
// them, so nothing forces them to refuse a call: none may fail, be lost, or be done twice.
func TestRandomRestarts(t *testing.T) {
	restarts := 30
	if testing.Short() {
		restarts = 10
	}
	s := newRestartSite(t)
	proxy := s.start(t)
	putters := s.putters(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var working sync.WaitGroup
	var failures sync.Map
	var calls atomic.Int64
	for _, p := range putters {
		working.Go(func() {
			for ; ctx.Err() == nil; p.done++ {
				asking, done := context.WithTimeout(context.WithoutCancel(ctx), within)
				err := p.put(asking, p.key(p.done), s.env.Sealed.Value(p.key(p.done)))
				done()
				if err != nil {
					failures.Store(fmt.Sprintf("%s: put %d: %v", p.name, p.done, err), true)
				}
				calls.Add(1)
				time.Sleep(p.pause) // limits the rate
			}
		})
	}
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	for i := range restarts {
		if i%2 == 0 {
			before := calls.Load()
			harness.Eventually(t, within, "calls to go on", func() error {
				if n := calls.Load(); n < before+50 {
					return fmt.Errorf("%d calls, %d before", n, before)
				}
				return nil
			})
		}
		time.Sleep(time.Duration(random.Int64N(int64(50 * time.Millisecond)))) // the moment is what is random
		old := proxy
		if i%3 == 0 { // both accept connections for a while
			proxy = s.start(t)
			s.stop(t, old)
		} else {
			s.stop(t, old)
			proxy = s.start(t)
		}
	}
	cancel()
	working.Wait()
	failures.Range(func(what, _ any) bool { t.Error(what); return true })
	t.Logf("%d calls over %d restarts", calls.Load(), restarts)

	kv := pb.NewKVClient(harness.Dial(t, s.plain, nil))
	for _, p := range putters {
		for i := range p.done {
			asking, done := context.WithTimeout(t.Context(), within)
			r, err := kv.Range(asking, &pb.RangeRequest{Key: []byte(p.key(i))})
			done()
			switch {
			case err != nil:
				t.Fatal(err)
			case len(r.Kvs) == 0:
				t.Errorf("%s: put %d is lost", p.name, i)
			case r.Kvs[0].Version != 1:
				t.Errorf("%s: put %d was done %d times", p.name, i, r.Kvs[0].Version)
			case strings.TrimSpace(string(r.Kvs[0].Value)) != s.env.Sealed.Value(p.key(i)):
				t.Errorf("%s: put %d has another value", p.name, i)
			}
		}
	}
	s.stop(t, proxy)
}

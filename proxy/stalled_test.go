package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// serveDeaf is an etcd that says it takes all there is, and takes nothing. waits is how many bytes
// have arrived to it on one connection, or 0.
func serveDeaf(t *testing.T) (endpoint string, waits func() int) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s") // a socket, whose buffers are small
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	var mu sync.Mutex
	var conns []*net.UnixConn
	go func() {
		defer close(served)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
				t.Error(err)
			}
			f := http2.NewFramer(conn, conn)
			err = errors.Join(f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30}), f.WriteWindowUpdate(0, 1<<30), f.WriteSettingsAck())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			conns = append(conns, conn.(*net.UnixConn))
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-served
	})
	return "unix://" + path, func() (most int) {
		mu.Lock()
		defer mu.Unlock()
		for _, conn := range conns {
			raw, err := conn.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := raw.Control(func(fd uintptr) {
				n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
				if err != nil {
					t.Error(err)
				}
				most = max(most, n)
			}); err != nil {
				t.Fatal(err)
			}
		}
		return most
	}
}

// TestMemberThatTakesNothing: the calls that go to it wait, and no other.
func TestMemberThatTakesNothing(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		deaf, waits := serveDeaf(t)
		p := startProxy(t, proxytest.ServeStore(t), nil, func(c *Config) {
			c.Upstream.Endpoints = append(c.Upstream.Endpoints, deaf)
		})
		kv := pb.NewKVClient(proxytest.Dial(t, p.Addrs()[0].String(), grpc.WithTransportCredentials(insecure.NewCredentials())))
		ctx, cancel := context.WithCancel(proxytest.TestContext(t))
		var all sync.WaitGroup
		defer all.Wait()
		defer cancel()
		put := func(size int) <-chan error {
			done := make(chan error, 1)
			all.Go(func() {
				_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("k"), Value: make([]byte, size)})
				done <- err
			})
			return done
		}
		// One message at a time, because endpoints take turns: the only call that does not end
		// is the one to the deaf member. Its message is larger than all buffers on the way.
		const size = 1 << 20
		stuck := put(size)
		proxytest.Eventually(t, "full buffers", func() bool {
			select {
			case err := <-stuck:
				if err != nil {
					t.Fatal(err)
				}
				stuck = put(size)
			default:
			}
			return waits() > 64<<10
		})
		var ended []<-chan error
		proxytest.Eventually(t, "calls to the other member", func() bool {
			ended = append(ended, put(1))
			n := 0
			for _, c := range ended {
				n += len(c)
			}
			return n >= 4
		})
		for _, c := range ended {
			if len(c) > 0 {
				if err := <-c; err != nil {
					t.Fatal(err)
				}
			}
		}
		if len(stuck) > 0 {
			t.Fatalf("the call to the deaf member ended: %v", <-stuck)
		}
	})
}

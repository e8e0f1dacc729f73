package pluginserver

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/plugin"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const canary = "Canary-secret-of-thirty-2-bytes!"

// newClient returns a client that is closed when the test ends.
func newClient(t *testing.T, cfg plugin.Config) *plugin.KMS {
	t.Helper()
	k, err := plugin.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func newLocal(t *testing.T) *local.KMS {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key.yaml")
	if err := local.NewKeyFile(path); err != nil {
		t.Fatal(err)
	}
	l, err := local.New(local.Config{KeyFile: path})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// newServer makes a server before a backend; edit may be nil.
func newServer(t *testing.T, s kmsclient.Service, edit func(*Config)) *Server {
	t.Helper()
	c, err := kmsclient.New(kmsclient.Config{Name: "acme", Backend: s})
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Provider: "acme", KMS: c, SealUnreachableFor: time.Hour}
	if edit != nil {
		edit(&cfg)
	}
	server, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return server
}

// running is a server that serves.
type running struct {
	endpoint string
	cancel   context.CancelFunc
	ended    chan error
}

// serve serves until the test ends.
func serve(t *testing.T, server *Server) *running {
	t.Helper()
	path := filepath.Join(kmstest.SocketDir(t), "kms.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{endpoint: "unix://" + path, cancel: cancel, ended: make(chan error, 1)}
	go func() {
		r.ended <- server.Serve(ctx, l)
		close(r.ended)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-r.ended; err != nil {
			t.Error(err)
		}
	})
	return r
}

// TestServerConformance runs the suite of all backends through the server and the client.
func TestServerConformance(t *testing.T) {
	for name, backend := range map[string]func(*testing.T) kmsclient.Service{
		"memory": func(*testing.T) kmsclient.Service { return kmstest.NewMemory() },
		"local":  func(t *testing.T) kmsclient.Service { return newLocal(t) },
		"two servers": func(t *testing.T) kmsclient.Service {
			return newClient(t, plugin.Config{Endpoint: serve(t, newServer(t, kmstest.NewMemory(), nil)).endpoint})
		},
	} {
		t.Run(name, func(t *testing.T) {
			kmstest.Conformance(t, func(t *testing.T) kmsclient.Service {
				return newClient(t, plugin.Config{Endpoint: serve(t, newServer(t, backend(t), nil)).endpoint})
			}, kmstest.MaxPlaintext(512)) // more may not be storable once it is wrapped
		})
	}
}

func TestBadServers(t *testing.T) {
	c, err := kmsclient.New(kmsclient.Config{Name: "acme", Backend: kmstest.NewMemory()})
	if err != nil {
		t.Fatal(err)
	}
	for i, cfg := range []Config{
		{}, {Provider: "acme"}, {KMS: c}, {Provider: "acme", KMS: c, PollInterval: -1}, {Provider: "acme", KMS: c, FailingPollInterval: -1},
		{Provider: "acme", KMS: c, SealUnreachableFor: -1}, {Provider: "acme", KMS: c, DrainTimeout: -1},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%d: took %+v", i, cfg)
		}
	}
}

// TestStatusIsFree asks a thousand times, which costs what asking once does; wrapping costs one
// call each.
func TestStatusIsFree(t *testing.T) {
	f := kmstest.NewFault(withoutKeys{kmstest.NewMemory()})
	k := newClient(t, plugin.Config{Endpoint: serve(t, newServer(t, f.Service(), nil)).endpoint})
	for range 1000 {
		if s, err := k.Status(t.Context()); err != nil || s.KeyID != "memory/1" || s.Healthz != "ok" || s.Version != "v2" {
			t.Fatalf("%+v, %v", s, err)
		}
	}
	for range 3 {
		if _, err := k.Encrypt(t.Context(), "uid", []byte(canary)); err != nil {
			t.Fatal(err)
		}
	}
	if s, e := f.Calls("Status"), f.Calls("Encrypt"); s != 1 || e != 3 {
		t.Errorf("%d calls of Status and %d of Encrypt; want 1 and 3", s, e)
	}
}

// withoutKeys hides that a service makes data keys: an API server makes its own.
type withoutKeys struct{ kmsclient.Service }

// TestServerDrains finishes what is under way, and takes nothing more: the socket is gone at once.
func TestServerDrains(t *testing.T) {
	f := kmstest.NewFault(kmstest.NewMemory())
	arrived, release := make(chan struct{}), make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	f.SetFault(func(op string, _ int) *kmstest.Failure {
		if op == "Encrypt" {
			close(arrived)
			<-release
		}
		return nil
	})
	r := serve(t, newServer(t, f.Service(), nil))
	t.Cleanup(let)
	k := newClient(t, plugin.Config{Endpoint: r.endpoint})
	ended := make(chan error, 1)
	go func() {
		_, err := k.Encrypt(context.Background(), "uid", []byte(canary))
		ended <- err
	}()
	<-arrived
	r.cancel()
	path := strings.TrimPrefix(r.endpoint, "unix://")
	for {
		if _, err := os.Lstat(path); err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-r.ended:
		t.Fatalf("ended with a call under way: %v", err)
	case err := <-ended:
		t.Fatalf("the call was not waited for: %v", err)
	default:
	}
	let()
	if err := <-ended; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	if err := <-r.ended; err != nil {
		t.Error(err)
	}
}

// TestServerCuts ends what takes longer than the drain may: a call whose KMS hangs, and a Status
// that waits for the first contact.
func TestServerCuts(t *testing.T) {
	f := kmstest.NewFault(kmstest.NewMemory())
	arrived := make(chan string, 16)
	f.SetFault(func(op string, _ int) *kmstest.Failure {
		arrived <- op
		return &kmstest.Failure{Hang: true}
	})
	r := serve(t, newServer(t, f.Service(), func(c *Config) { c.DrainTimeout = 50 * time.Millisecond }))
	k := newClient(t, plugin.Config{Endpoint: r.endpoint})
	errs := make(chan error, 2)
	go func() {
		_, err := k.Status(context.Background())
		errs <- err
	}()
	go func() {
		_, err := k.Encrypt(context.Background(), "uid", []byte(canary))
		errs <- err
	}()
	for op := ""; op != "Encrypt"; {
		op = <-arrived
	}
	r.cancel()
	if err := <-r.ended; err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := <-errs; err == nil {
			t.Error("a call succeeded without a KMS")
		}
	}
}

func TestServeFails(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(kmstest.SocketDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := newServer(t, kmstest.NewMemory(), nil).Serve(t.Context(), l); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
	// One that is told to end before it begins does not.
	l, err = Listen(filepath.Join(kmstest.SocketDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newServer(t, kmstest.NewMemory(), nil).Serve(ctx, l); err != nil {
		t.Error(err)
	}
}

// TestGivesUp answers a caller whose deadline passes with just that.
func TestGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := kmstest.NewFault(kmstest.NewMemory())
		f.SetFault(func(string, int) *kmstest.Failure { return &kmstest.Failure{Hang: true} })
		s := newServer(t, f.Service(), nil)
		for cause, want := range map[error]codes.Code{context.DeadlineExceeded: codes.DeadlineExceeded, context.Canceled: codes.Canceled} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if errors.Is(cause, context.Canceled) {
				time.AfterFunc(time.Millisecond, cancel)
			}
			_, err := s.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: []byte(canary)})
			_, errStatus := s.Status(ctx, nil)
			cancel()
			if status.Code(err) != want || status.Code(errStatus) != want {
				t.Errorf("%v: %v, %v", cause, err, errStatus)
			}
		}
	})
}

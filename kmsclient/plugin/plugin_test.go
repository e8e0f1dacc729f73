package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

const canary = "Canary-secret-of-thirty-2-bytes!"

// callAll calls each operation once and returns the errors.
func callAll(ctx context.Context, s kmsclient.Service) map[string]error {
	errs := map[string]error{}
	_, errs["Encrypt"] = s.Encrypt(ctx, "uid", []byte(canary))
	_, errs["Decrypt"] = s.Decrypt(ctx, "uid", &service.DecryptRequest{Ciphertext: []byte("c"), KeyID: "the key"})
	_, errs["Status"] = s.Status(ctx)
	return errs
}

// asError fails the test unless err wraps a *kmsclient.Error, which it returns.
func asError(t *testing.T, err error) *kmsclient.Error {
	t.Helper()
	var e *kmsclient.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want a *kmsclient.Error", err)
	}
	return e
}

// awaitReady waits until the client is connected.
func awaitReady(t *testing.T, k *KMS) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for state := k.conn.GetState(); state != connectivity.Ready; state = k.conn.GetState() {
		k.conn.Connect() // an idle client waits for a call
		if !k.conn.WaitForStateChange(ctx, state) {
			t.Fatalf("the connection stays %v", state)
		}
	}
}

func TestBadEndpoints(t *testing.T) {
	for _, endpoint := range []string{
		"", "/run/kms.sock", "unix:", "unix://", "unix:///", "unix://run/kms.sock", "unix:/run/kms.sock", "unix:///@", "UNIX:///run/kms.sock",
		"tcp://127.0.0.1:1", "dns:///example.com", "http:///run/kms.sock", " unix:///run/kms.sock", "unix-abstract:name",
	} {
		k, err := New(Config{Endpoint: endpoint})
		if err == nil {
			k.Close()
			t.Errorf("took the endpoint %q", endpoint)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("%q", endpoint)) {
			t.Errorf("%q: the error does not name it: %v", endpoint, err)
		}
	}
}

// TestPaths connects to files of every name that the configuration allows; % ? and # it does not.
func TestPaths(t *testing.T) {
	for _, name := range []string{"kms.sock", "with space", "ünï", "co:lon", "@at", "plus+and&"} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "kms")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			endpoint := "unix://" + filepath.Join(dir, name)
			p := kmstest.NewPlugin(t, endpoint, kmstest.NewMemory())
			p.Start()
			if _, err := newClient(t, Config{Endpoint: endpoint}).Status(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAbstractSocket(t *testing.T) {
	endpoint := fmt.Sprintf("unix:///@etcd-kms-proxy-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	p := kmstest.NewPlugin(t, endpoint, kmstest.NewMemory())
	p.Start()
	if s, err := newClient(t, Config{Endpoint: endpoint}).Status(t.Context()); err != nil || s.KeyID != "memory/1" {
		t.Errorf("%v, %v", s, err)
	}
}

// TestPluginComesAndGoes begins without a socket, and survives that the plugin stops and starts.
func TestPluginComesAndGoes(t *testing.T) {
	p := kmstest.NewPlugin(t, "", kmstest.NewMemory())
	k := newClient(t, Config{Endpoint: p.Endpoint})
	for range 3 {
		for op, err := range callAll(t.Context(), k) {
			if e := asError(t, err); e.Class() != kmsclient.ClassUnavailable || e.Code != "Unavailable" || e.Op != op {
				t.Errorf("without a plugin: %+v", e)
			}
		}
		p.Start()
		awaitReady(t, k)
		res, err := k.Encrypt(t.Context(), "uid", []byte(canary))
		if err != nil {
			t.Fatal(err)
		}
		got, err := k.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations})
		if err != nil || string(got) != canary {
			t.Errorf("unwrapped %d bytes, %v", len(got), err)
		}
		p.Stop()
	}
}

// TestCodes gives every gRPC code its class, and keeps the plugin's text out.
func TestCodes(t *testing.T) {
	f := kmstest.NewFault(kmstest.NewMemory())
	k := newClient(t, Config{Endpoint: kmstest.PluginServer(t, f.Service())})
	want := map[codes.Code]kmsclient.Reason{
		codes.Canceled:           kmsclient.Unreachable,
		codes.Unknown:            kmsclient.Failing,
		codes.InvalidArgument:    kmsclient.Invalid,
		codes.DeadlineExceeded:   kmsclient.Unreachable,
		codes.NotFound:           kmsclient.KeyGone,
		codes.AlreadyExists:      kmsclient.Failing,
		codes.PermissionDenied:   kmsclient.Denied,
		codes.ResourceExhausted:  kmsclient.Unreachable,
		codes.FailedPrecondition: kmsclient.KeyDisabled,
		codes.Aborted:            kmsclient.Failing,
		codes.OutOfRange:         kmsclient.Invalid,
		codes.Unimplemented:      kmsclient.BrokenContract,
		codes.Internal:           kmsclient.Failing,
		codes.Unavailable:        kmsclient.Unreachable,
		codes.DataLoss:           kmsclient.Invalid,
		codes.Unauthenticated:    kmsclient.Denied,
		codes.Code(99):           kmsclient.Failing, // of a gRPC to come
	}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		if _, ok := want[code]; !ok {
			t.Errorf("the table has no %v", code)
		}
	}
	for code, reason := range want {
		f.SetFault(func(string, int) *kmstest.Failure {
			return &kmstest.Failure{Err: status.Error(code, "cannot wrap "+canary)}
		})
		for op, err := range callAll(t.Context(), k) {
			e := asError(t, err)
			if e.Reason != reason || e.Code != code.String() || e.Op != op {
				t.Errorf("%v: got %+v, want %v", code, e, reason)
			}
			if wantKey := map[string]string{"Decrypt": "the key"}[op]; e.KeyID != wantKey {
				t.Errorf("%v, %s: the error names the key %q, want %q", code, op, e.KeyID, wantKey)
			}
			if text := fmt.Sprintf("%v %+v", err, err); strings.Contains(text, "anary") {
				t.Errorf("%v, %s: the plugin's text is shown: %v", code, op, err)
			}
		}
	}
}

// TestContexts ends a call of a plugin that hangs with the caller's context, or with its deadline.
func TestContexts(t *testing.T) {
	f := kmstest.NewFault(kmstest.NewMemory())
	endpoint := kmstest.PluginServer(t, f.Service())
	f.SetFault(func(string, int) *kmstest.Failure { return &kmstest.Failure{Hang: true} })
	k := newClient(t, Config{Endpoint: endpoint})
	short, end := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer end()
	for op, err := range callAll(short, k) {
		if e := asError(t, err); !errors.Is(err, context.DeadlineExceeded) || e.Class() != kmsclient.ClassUnavailable {
			t.Errorf("%s, timeout: %v", op, err)
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	f.SetFault(func(string, int) *kmstest.Failure { cancel(); return &kmstest.Failure{Hang: true} })
	_, err := k.Encrypt(ctx, "uid", []byte(canary))
	if e := asError(t, err); !errors.Is(err, context.Canceled) || e.Class() != kmsclient.ClassUnavailable {
		t.Errorf("cancelled: %v", err)
	}
}

// TestClose ends the calls under way. What it may leave behind, goleak reports.
func TestClose(t *testing.T) {
	f := kmstest.NewFault(kmstest.NewMemory())
	k := newClient(t, Config{Endpoint: kmstest.PluginServer(t, f.Service())})
	called := make(chan struct{})
	f.SetFault(func(string, int) *kmstest.Failure { close(called); return &kmstest.Failure{Hang: true} })
	ended := make(chan error)
	go func() {
		_, err := k.Status(t.Context())
		ended <- err
	}()
	<-called
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	asError(t, <-ended)
	for _, err := range callAll(t.Context(), k) {
		if e := asError(t, err); e.Class() != kmsclient.ClassUnavailable {
			t.Errorf("after Close: %v", err)
		}
	}
	unused, err := New(Config{Endpoint: "unix://" + filepath.Join(t.TempDir(), "none")})
	if err != nil {
		t.Fatal(err)
	}
	if err := unused.Close(); err != nil {
		t.Errorf("close of a client that never called: %v", err)
	}
}

// TestNotGRPC is about a socket of something else.
func TestNotGRPC(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n" + canary))
			conn.Close()
		}
	}()
	defer func() {
		listener.Close()
		<-done
	}()
	for op, err := range callAll(t.Context(), newClient(t, Config{Endpoint: "unix://" + path})) {
		if e := asError(t, err); e.Class() != kmsclient.ClassUnavailable || strings.Contains(err.Error(), "anary") {
			t.Errorf("%s: %v", op, err)
		}
	}
}

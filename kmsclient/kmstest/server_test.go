package kmstest

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// dial returns a client of an endpoint that shares no code with the plugin backend.
func dial(t *testing.T, endpoint string) kmsapi.KeyManagementServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return kmsapi.NewKeyManagementServiceClient(conn)
}

func TestPluginServer(t *testing.T) {
	m := NewMemory()
	c := dial(t, PluginServer(t, m))
	s, err := c.Status(t.Context(), &kmsapi.StatusRequest{})
	if err != nil || s.Version != "v2" || s.Healthz != "ok" || s.KeyId != "memory/1" {
		t.Errorf("status %v, %v", s, err)
	}
	res, err := c.Encrypt(t.Context(), &kmsapi.EncryptRequest{Uid: uid, Plaintext: []byte(canary)})
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Decrypt(t.Context(), &kmsapi.DecryptRequest{Uid: uid, Ciphertext: res.Ciphertext, KeyId: res.KeyId, Annotations: res.Annotations})
	if err != nil || string(got.Plaintext) != canary {
		t.Errorf("unwrapped %v, %v", got, err)
	}
}

// TestCodes holds what a client sees of a service's errors.
func TestCodes(t *testing.T) {
	f := NewFault(NewMemory())
	c := dial(t, PluginServer(t, f.Service()))
	reason := func(r kmsclient.Reason) Failure { return Failure{Err: &kmsclient.Error{Reason: r, Detail: "the text"}} }
	for _, tc := range []struct {
		failure Failure
		want    codes.Code
	}{
		{reason(kmsclient.Unreachable), codes.Unavailable},
		{reason(kmsclient.Denied), codes.PermissionDenied},
		{reason(kmsclient.KeyDisabled), codes.FailedPrecondition},
		{reason(kmsclient.Invalid), codes.InvalidArgument},
		{reason(kmsclient.BrokenContract), codes.Internal},
		{Failure{Err: errors.New("the text")}, codes.Unknown},
		{Failure{Err: status.Error(codes.DataLoss, "the text")}, codes.DataLoss},
		{Failure{Panic: "the text"}, codes.Internal},
	} {
		f.Inject(opStatus, tc.failure)
		_, err := c.Status(t.Context(), &kmsapi.StatusRequest{})
		if status.Code(err) != tc.want || !strings.Contains(err.Error(), "the text") {
			t.Errorf("%+v: got %v, want code %v", tc.failure, err, tc.want)
		}
	}
}

// TestPluginStopsAndStarts leaves no listener, file or handler behind when it stops, and serves
// again on the same endpoint.
func TestPluginStopsAndStarts(t *testing.T) {
	f := NewFault(NewMemory())
	p := NewPlugin(t, "", f.Service())
	path := strings.TrimPrefix(p.Endpoint, "unix://")
	p.Stop() // nothing to stop
	for range 3 {
		p.Start()
		f.Inject(opStatus, Failure{Hang: true})
		called := make(chan struct{})
		f.SetFault(func(string, int) *Failure { close(called); return &Failure{Hang: true} })
		client := dial(t, p.Endpoint)
		ended := make(chan error, 2)
		for range 2 {
			go func() {
				_, err := client.Status(t.Context(), &kmsapi.StatusRequest{})
				ended <- err
			}()
		}
		<-called
		p.Stop() // waits for the handlers that hang
		for range 2 {
			if err := <-ended; status.Code(err) != codes.Unavailable {
				t.Errorf("a call that the stop cut: %v", err)
			}
		}
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("the socket is left: %v", err)
		}
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			t.Error("something still listens")
		}
	}
}

// slowToEnd takes a while to notice that its call was cut.
type slowToEnd struct {
	kmsclient.Service
	called chan struct{}
	ended  atomic.Bool
}

func (s *slowToEnd) Status(ctx context.Context) (*service.StatusResponse, error) {
	close(s.called)
	<-ctx.Done()
	for range 1000 {
		runtime.Gosched()
	}
	s.ended.Store(true)
	return nil, ctx.Err()
}

// TestStopWaitsForHandlers lets a test look at its service after Stop without a race.
func TestStopWaitsForHandlers(t *testing.T) {
	s := &slowToEnd{Service: NewMemory(), called: make(chan struct{})}
	p := NewPlugin(t, "", s)
	p.Start()
	client := dial(t, p.Endpoint)
	go client.Status(t.Context(), &kmsapi.StatusRequest{})
	<-s.called
	p.Stop()
	if !s.ended.Load() {
		t.Error("a handler outlived the server")
	}
}

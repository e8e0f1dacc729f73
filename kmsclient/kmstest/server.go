package kmstest

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// SocketDir makes a folder for a socket, which is removed when the test ends. A socket's path has
// at most 107 bytes, which the test's own folder may exceed.
func SocketDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		tb.Fatalf("make folder of a socket: %v", err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// PluginServer serves a service as a Kubernetes KMS v2 plugin on a unix socket until the test ends,
// and returns its endpoint.
func PluginServer(tb testing.TB, s kmsclient.Service) (endpoint string) {
	tb.Helper()
	p := NewPlugin(tb, "", s)
	p.Start()
	return p.Endpoint
}

// Plugin serves a service as a Kubernetes KMS v2 plugin, and can be stopped and started again.
//
// A *kmsclient.Error travels as the gRPC code of its class; any other error as k8s.io/kms leaves
// it, which is with the code Unknown and its whole text. A panic is answered with Internal, since
// it would end the test's process.
type Plugin struct {
	Endpoint string // unix:///path or unix:///@name

	tb      testing.TB
	address string
	service *service.GRPCService
	server  *grpc.Server
	serving sync.WaitGroup
}

// NewPlugin makes a plugin that does not serve before [Plugin.Start]. An empty endpoint is a new
// socket file. The plugin stops when the test ends.
func NewPlugin(tb testing.TB, endpoint string, s kmsclient.Service) *Plugin {
	tb.Helper()
	if endpoint == "" {
		endpoint = "unix://" + filepath.Join(SocketDir(tb), "plugin.sock")
	}
	address := strings.TrimPrefix(endpoint, "unix://")
	if strings.HasPrefix(address, "/@") {
		address = address[1:]
	}
	// GRPCService only translates messages here: its own server cannot be awaited.
	p := &Plugin{Endpoint: endpoint, tb: tb, address: address, service: service.NewGRPCService(address, time.Second, s)}
	tb.Cleanup(p.Stop)
	return p
}

// Start listens and serves. When it returns, clients can connect.
func (p *Plugin) Start() {
	p.tb.Helper()
	if p.server != nil {
		p.tb.Fatal("the plugin serves already")
	}
	listener, err := net.Listen("unix", p.address)
	if err != nil {
		p.tb.Fatalf("listen for the plugin: %v", err)
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(response), grpc.WaitForHandlers(true))
	kmsapi.RegisterKeyManagementServiceServer(server, p.service)
	p.server = server
	p.serving.Go(func() { _ = server.Serve(listener) })
}

// Stop cuts every connection, as a crash would, and waits until nothing of the server is left. It
// may be called when nothing is served.
func (p *Plugin) Stop() {
	if p.server == nil {
		return
	}
	p.server.Stop()
	p.serving.Wait()
	p.server = nil
}

// response gives a handler's error the code that a careful plugin would, and survives its panic.
func response(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (res any, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = status.Errorf(codes.Internal, "panic: %v", r)
		}
		var e *kmsclient.Error
		if errors.As(err, &e) {
			err = status.Error(codeOf(e), err.Error())
		}
	}()
	return handler(ctx, req)
}

func codeOf(e *kmsclient.Error) codes.Code {
	switch e.Reason {
	case kmsclient.Failing, kmsclient.Unhealthy:
		return codes.Unknown
	case kmsclient.Denied:
		return codes.PermissionDenied
	case kmsclient.KeyDisabled:
		return codes.FailedPrecondition
	case kmsclient.KeyGone, kmsclient.KeyNotFound, kmsclient.AliasNotFound:
		return codes.NotFound
	case kmsclient.Invalid:
		return codes.InvalidArgument
	case kmsclient.BrokenContract:
		return codes.Internal
	}
	return codes.Unavailable
}

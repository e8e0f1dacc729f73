package plugin

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestWhyThereIsNoPlugin: each thing that may be where a plugin's socket should be has a text of
// its own, which names it.
func TestWhyThereIsNoPlugin(t *testing.T) {
	seen := map[string]string{}
	for name, c := range map[string]struct {
		place func(t *testing.T, path string)
		want  string
	}{
		"missing":        {func(*testing.T, string) {}, "there is no socket"},
		"missing folder": {func(t *testing.T, path string) { must(t, os.Remove(filepath.Dir(path))) }, "there is no socket"},
		"file":           {func(t *testing.T, path string) { must(t, os.WriteFile(path, nil, 0o600)) }, "is a regular file and not a socket"},
		"folder":         {func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o700)) }, "is a folder and not a socket"},
		"device":         {func(t *testing.T, path string) { must(t, os.Symlink("/dev/null", path)) }, "is not a socket"},
		"left behind": {func(t *testing.T, path string) {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			must(t, err)
			l.SetUnlinkOnClose(false)
			must(t, l.Close())
		}, "nothing listens on the socket"},
		"not of streams": {func(t *testing.T, path string) {
			c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
			must(t, err)
			t.Cleanup(func() { c.Close() })
		}, "is of another kind than a plugin's"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(kmstest.SocketDir(t), "s")
			c.place(t, path)
			for op, err := range callAll(t.Context(), newClient(t, Config{Endpoint: "unix://" + path})) {
				e := asError(t, err)
				if e.Reason != kmsclient.Unreachable || !strings.Contains(e.Detail, c.want) || !strings.Contains(e.Detail, fmt.Sprintf("%q", path)) {
					t.Errorf("%s: %+v, want %q", op, e, c.want)
				}
				seen[c.want] = e.Detail
			}
		})
	}
	t.Run("no abstract socket", func(t *testing.T) {
		_, err := newClient(t, Config{Endpoint: "unix:///@etcd-kms-proxy-test-none"}).Status(t.Context())
		if e := asError(t, err); !strings.Contains(e.Detail, `the abstract socket "@etcd-kms-proxy-test-none"`) {
			t.Error(err)
		}
	})
	// root, as whom tests may run, is permitted everything
	t.Run("not permitted", func(t *testing.T) {
		path := filepath.Join(kmstest.SocketDir(t), "s")
		l, err := net.Listen("unix", path)
		must(t, err)
		defer l.Close()
		if text := unreachable(path, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EACCES)}); !strings.Contains(text, "permission denied on the socket") {
			t.Error(text)
		}
	})
	if len(seen) != 6 {
		t.Errorf("%d texts: %q", len(seen), seen)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serveOld answers as a plugin that serves KMS v1 only, whose API is deprecated: Version is enough.
func serveOld(_ any, stream grpc.ServerStream) error {
	if method, _ := grpc.MethodFromServerStream(stream); method != "/v1beta1.KeyManagementService/Version" {
		return status.Error(codes.Unimplemented, "unknown service")
	}
	if err := stream.RecvMsg(&kmsapi.StatusRequest{}); err != nil {
		return err
	}
	return stream.SendMsg(&kmsapi.StatusResponse{Version: "v1beta1"})
}

// TestOldPlugin: one that serves KMS v1 only is called that, and one that serves neither is not.
func TestOldPlugin(t *testing.T) {
	for name, want := range map[string]string{"v1": "serves KMS v1 only", "neither": "does not serve this method of KMS v2"} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(kmstest.SocketDir(t), "s")
			l, err := net.Listen("unix", path)
			must(t, err)
			server := grpc.NewServer()
			if name == "v1" {
				server = grpc.NewServer(grpc.UnknownServiceHandler(serveOld))
			}
			served := make(chan error, 1)
			go func() { served <- server.Serve(l) }()
			defer func() { server.Stop(); <-served }()
			for op, err := range callAll(t.Context(), newClient(t, Config{Endpoint: "unix://" + path})) {
				if e := asError(t, err); e.Class() != kmsclient.ClassContract || !strings.Contains(e.Detail, want) {
					t.Errorf("%s: %+v", op, e)
				}
			}
		})
	}
}

// TestPluginEnds: a plugin that was there and is not any more.
func TestPluginEnds(t *testing.T) {
	p := kmstest.NewPlugin(t, "", kmstest.NewMemory())
	k := newClient(t, Config{Endpoint: p.Endpoint})
	p.Start()
	awaitReady(t, k)
	p.Stop()
	var texts []string
	for range 100 { // first the connection is closed, then there is no socket
		_, err := k.Status(t.Context())
		texts = append(texts, asError(t, err).Detail)
		if strings.Contains(texts[len(texts)-1], "there is no socket") {
			return
		}
	}
	t.Errorf("%q", texts)
}

package cli

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"k8s.io/kms/pkg/service"

	configuration "github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestServePluginAlibaba serves a cloud key: through its rotation, an outage of its state, and with
// the KMS' request IDs.
func TestServePluginAlibaba(t *testing.T) {
	double := clitest.NewDouble(t, kmsdouble.Config{})
	d, path := clitest.NewDir(t), filepath.Join(kmstest.SocketDir(t), "kms.sock")
	for name, secret := range map[string]string{"id": kmsdouble.DefaultAccessKeyID, "secret": kmsdouble.DefaultAccessKeySecret} {
		if err := os.WriteFile(d.Path(name), []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := d.Config(t, "local: {keyFile: key.yaml}", `pollInterval: 1s
  alibaba:
    region: `+double.Region()+`
    keyID: `+kmsdouble.DefaultKeyID+`
    endpoint: `+double.Endpoint()+`
    caFile: `+double.CAFile()+`
    credentials: {accessKeyIDFile: id, accessKeySecretFile: secret}`)
	s := servePluginOn(t, config, "dev", path)
	k := pluginClient(t, path)
	keyID := func() string {
		st, err := k.Status(t.Context())
		if err != nil {
			return err.Error()
		}
		return st.KeyID
	}
	before := double.PrimaryKeyID(kmsdouble.DefaultKeyID)
	if got := keyID(); got != before {
		t.Errorf("key ID %q, want %q", got, before)
	}
	res, err := k.Encrypt(t.Context(), "uid", []byte(seedText))
	if err != nil {
		t.Fatal(err)
	}
	if id := res.Annotations["request-id.etcd-kms-proxy.io"]; len(id) != 36 {
		t.Errorf("annotations %q; want the KMS' request ID", res.Annotations)
	}
	// The proxy, which has the KMS without a plugin between, is given that annotation too when it
	// reads what an API server wrote.
	c, err := configuration.Load(config)
	if err != nil {
		t.Fatal(err)
	}
	b, err := provider.New(c.KMS[0], slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	req := &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations}
	if got, err := b.Service.Decrypt(t.Context(), "uid", req); err != nil || string(got) != seedText {
		t.Errorf("the backend itself: %v", err)
	}
	double.Rotate(kmsdouble.DefaultKeyID)
	after := double.PrimaryKeyID(kmsdouble.DefaultKeyID)
	clitest.Eventually(t, "new key ID", func() bool { return keyID() == after })
	got, err := k.Decrypt(t.Context(), "uid", req)
	if err != nil || string(got) != seedText || before == after {
		t.Errorf("what the version before wrapped: %q, %v", got, err)
	}
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
	clitest.Eventually(t, "refusal", func() bool { return strings.Contains(keyID(), "FailedPrecondition") })
	if code, page := get(t, s, "/readyz"); code != http.StatusOK || !strings.Contains(page, "[-]kms dev: ") {
		t.Errorf("readyz: %d %s", code, page)
	}
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
	s.signal(syscall.SIGTERM)
	s.exited(0)
	if strings.Contains(s.text(), kmsdouble.DefaultAccessKeySecret) {
		t.Error("the log holds the access key's secret")
	}
}

// silentKMS is a plugin that answers no call until the test ends. arrived gets the method of each.
func silentKMS(t *testing.T, path string) (arrived chan string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	arrived = make(chan string, 64)
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		arrived <- method
		<-stream.Context().Done()
		return stream.Context().Err()
	}))
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() { s.Stop(); <-served })
	return arrived
}

// TestServePluginDrain cuts a call that does not end, and a second signal ends the process at once.
func TestServePluginDrain(t *testing.T) {
	d, dir := clitest.NewDir(t), kmstest.SocketDir(t)
	silent := filepath.Join(dir, "silent.sock")
	arrived := silentKMS(t, silent)
	config := d.Config(t, "local: {keyFile: key.yaml}", "plugin: {endpoint: 'unix://"+silent+"', timeout: 1m}", "admin: {address: \"127.0.0.1:0\"}\n", "")
	for name, tc := range map[string]struct {
		drain string
		code  int
	}{"cut": {"100ms", 0}, "second signal": {"1m", 3}} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, "kms.sock")
			s := servePluginOn(t, config, "dev", path, "--drain-timeout", tc.drain)
			k := pluginClient(t, path)
			failed := make(chan error, 1)
			go func() {
				_, err := k.Encrypt(context.Background(), "uid", []byte(seedText))
				failed <- err
			}()
			for method := ""; !strings.HasSuffix(method, "/Encrypt"); {
				select {
				case method = <-arrived:
				case <-time.After(clitest.Deadline):
					t.Fatal("the call does not arrive")
				}
			}
			s.signal(syscall.SIGTERM)
			s.logged("finishing calls", `"signal":"terminated"`)
			if tc.code != 0 {
				time.Sleep(time.Second) // a signal soon after the first one counts as the same
				s.signal(syscall.SIGTERM)
			}
			s.exited(tc.code)
			if err := <-failed; err == nil {
				t.Error("a call succeeded without a KMS")
			}
		})
	}
}

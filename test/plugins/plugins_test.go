package plugins

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	provider = "vendor"
	prefix   = "/registry/secrets/"
)

func serveTLS(t *testing.T, ca *harness.CA, handler http.HandlerFunc) string {
	t.Helper()
	pair := ca.Server("vendor")
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(handler)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	server.StartTLS()
	t.Cleanup(server.Close)
	return server.URL
}

// serveForward serves a forward proxy on loopback, which connects every CONNECT request to handler
// with the certificate of pair. It returns the proxy's URL.
func serveForward(t *testing.T, pair harness.Pair, handler http.HandlerFunc) string {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	vendor := httptest.NewUnstartedServer(handler)
	vendor.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	vendor.StartTLS()
	t.Cleanup(vendor.Close)
	return serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		up, err := net.Dial("tcp", vendor.Listener.Addr().String())
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer up.Close()
		down, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer down.Close()
		io.WriteString(down, "HTTP/1.1 200 OK\r\n\r\n")
		go func() {
			io.Copy(up, buffered)
			up.Close()
		}()
		io.Copy(down, up)
	})
}

// onlyLoopback reports whether this machine, or this network namespace, has no address that others
// could connect to.
func onlyLoopback(t *testing.T) bool {
	t.Helper()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range addresses {
		if ip, ok := address.(*net.IPNet); !ok || !ip.IP.IsLoopback() {
			return false
		}
	}
	return true
}

// TestPlugins runs each public plugin behind the proxy: what its key ID looks like, what a rotation
// needs, and what a disabled key and an outage of its vendor do. Its page in docs/plugins says so.
func TestPlugins(t *testing.T) {
	for _, s := range subjects() {
		t.Run(s.name, func(t *testing.T) {
			if _, err := os.Stat(binary(t, s.name)); err != nil {
				t.Skipf("%v: test/plugins/build.sh builds it from its own repository", err)
			}
			if s.everyAddress && !onlyLoopback(t) {
				t.Skip("the plugin serves its health on all addresses: run the test in a network namespace that has only loopback")
			}
			testPlugin(t, s)
		})
	}
}

// site is a plugin with a proxy and etcd.
type site struct {
	*running
	t     *testing.T
	env   *harness.Env
	proxy *harness.Proxy
	raw   pb.KVClient
}

func testPlugin(t *testing.T, s subject) {
	env := harness.New(t)
	k := &site{running: s.start(t, env), t: t, env: env}
	etcd := env.StartEtcd(harness.EtcdConfig{})
	k.raw = pb.NewKVClient(harness.Dial(t, etcd.Address, nil))
	k.proxy = env.NewProxy("proxy", harness.ProxyConfig{
		Etcd:  harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS:   []harness.KMSConfig{{Name: provider, PollInterval: "1s", Plugin: &harness.PluginKMS{Endpoint: "unix://" + k.socket, Timeout: "3s"}}},
		Rules: []harness.Rule{{Prefix: prefix, WriteWith: provider, AllowPlaintextReads: new(bool)}},
	})
	if s.unusable != "" {
		k.testUnusable(s.unusable)
		return
	}
	var report string
	harness.Eventually(t, time.Minute, "kms check to succeed", func() error {
		out, code := env.Run("kms", "check", "--config", k.proxy.ConfigFile)
		report = out
		if code != 0 {
			return fmt.Errorf("exit code %d: %s", code, out)
		}
		return nil
	})
	t.Logf("kms check:\n%s", report)
	k.start()
	k.proxy.WaitReady(time.Minute)

	first := k.put("first")
	if !regexp.MustCompile(`^` + s.keyID + `$`).MatchString(first.KeyID) {
		t.Errorf("key ID %q; want %s", first.KeyID, s.keyID)
	}
	t.Logf("key ID %q, wrapped seed of %d bytes, annotations %v", first.KeyID, len(first.Source), names(first.Annotations))
	k.mustGet("first")
	out, code := env.Run("status", "--config", k.proxy.ConfigFile)
	if code != 0 {
		t.Errorf("status: exit code %d: %s", code, out)
	}

	if s.rotation != "" {
		k.testRotation(s, first.KeyID)
	}
	if k.disable != nil {
		k.testRefusal("a disabled key", k.disable, s.code)
	}
	if k.outage != nil {
		k.testRefusal("an outage", k.outage, "")
	}
}

// testUnusable: kms check says what is wrong, and a proxy stores nothing.
func (k *site) testUnusable(want string) {
	harness.Eventually(k.t, time.Minute, "kms check to find the fault", func() error {
		out, code := k.env.Run("kms", "check", "--config", k.proxy.ConfigFile)
		if code == 0 || !strings.Contains(out, want) {
			return fmt.Errorf("exit code %d: %s", code, out)
		}
		k.t.Logf("kms check:\n%s", out)
		return nil
	})
	k.start()
	_, err := pb.NewKVClient(harness.Dial(k.t, k.proxy.Address, nil)).Put(k.t.Context(), &pb.PutRequest{Key: []byte(prefix + "none"), Value: []byte(k.env.Sealed.Value("none"))})
	if status.Code(err) != codes.Unavailable {
		k.t.Errorf("a put: %v; want Unavailable", err)
	}
	res, err := k.raw.Range(k.t.Context(), &pb.RangeRequest{Key: []byte(prefix + "none")})
	if err != nil || len(res.Kvs) != 0 {
		k.t.Errorf("%d values are stored, %v", len(res.Kvs), err)
	}
}

func (k *site) testRotation(s subject, before string) {
	k.rotate()
	if s.rotation == hidden {
		k.restart()
		if after := k.put("rotated").KeyID; after != before {
			k.t.Errorf("after a rotation the key ID is %q; it was thought to stay %q", after, before)
		}
	} else {
		harness.Eventually(k.t, time.Minute, "a new key ID", func() error {
			if after := k.put("rotated").KeyID; after == before {
				return fmt.Errorf("the key ID is %q still", after)
			}
			return nil
		})
	}
	k.mustGet("rotated")
	k.restart() // and so nothing is cached
	_, err := k.get("first")
	k.t.Logf("a value from before the rotation: %v", err)
	if s.rotatedReads != (err == nil) {
		k.t.Errorf("a value from before the rotation: %v", err)
	}
}

// testRefusal ends the vendor's service and begins it again. In between, a running proxy reads what
// it has cached, and a proxy without a cache refuses, as does kms check.
func (k *site) testRefusal(what string, set func(bool), code string) {
	k.put("before")
	set(true)
	k.mustGet("before")
	k.restart()
	begun := time.Now()
	value, err := k.get("before")
	k.t.Logf("%s, with an empty cache, after %v: %v", what, time.Since(begun).Round(10*time.Millisecond), err)
	if err == nil {
		k.t.Errorf("%s: read %d bytes", what, len(value))
	}
	if got := status.Code(err); got != codes.Unavailable {
		k.t.Errorf("%s: %v; want Unavailable, since the plugin gives no reason", what, got)
	}
	out, exit := k.env.Run("kms", "check", "--config", k.proxy.ConfigFile)
	k.t.Logf("%s, kms check:\n%s", what, out)
	if exit == 0 {
		k.t.Errorf("%s: kms check succeeds: %s", what, out)
	}
	if code != "" && !strings.Contains(out, fmt.Sprintf("code %q", code)) && !strings.Contains(out, "not healthy") {
		k.t.Errorf("%s: kms check names no code %q: %s", what, code, out)
	}
	set(false)
	begun = time.Now()
	harness.Eventually(k.t, 90*time.Second, "the value to be read again", func() error {
		_, err := k.get("before")
		return err
	})
	k.t.Logf("%s is over: read again after %v", what, time.Since(begun).Round(100*time.Millisecond))
	k.proxy.WaitReady(2 * time.Minute)
	k.t.Logf("%s is over: ready after %v", what, time.Since(begun).Round(100*time.Millisecond))
}

func (k *site) restart() {
	k.t.Helper()
	if !k.proxy.Stop(20 * time.Second) {
		k.t.Error("the proxy did not end within 20 s")
	}
	k.start()
}

// start starts the proxy, and waits until it answers for what it has.
func (k *site) start() {
	k.t.Helper()
	k.proxy.Start()
	// It refuses every call until it has compared its rules with those of the other proxies.
	harness.Eventually(k.t, 30*time.Second, "the rules to be compared", func() error {
		if _, err := k.get("none"); err != nil && strings.Contains(err.Error(), "has not yet compared") {
			return err
		}
		return nil
	})
}

// put writes a value through the proxy and returns how it is stored.
func (k *site) put(name string) envelope.Object {
	k.t.Helper()
	key, value := []byte(prefix+name), []byte(k.env.Sealed.Value(name))
	via := pb.NewKVClient(harness.Dial(k.t, k.proxy.Address, nil))
	harness.Eventually(k.t, time.Minute, "a put", func() error {
		ctx, cancel := context.WithTimeout(k.t.Context(), 10*time.Second)
		defer cancel()
		_, err := via.Put(ctx, &pb.PutRequest{Key: key, Value: value})
		return err
	})
	res, err := k.raw.Range(k.t.Context(), &pb.RangeRequest{Key: key})
	if err != nil || len(res.Kvs) != 1 {
		k.t.Fatal(res, err)
	}
	if !bytes.HasPrefix(res.Kvs[0].Value, []byte("k8s:enc:kms:v2:"+provider+":")) {
		k.t.Fatalf("%s is not encrypted", name)
	}
	_, data, _ := envelope.Split(res.Kvs[0].Value)
	o, err := envelope.Parse(data)
	if err != nil {
		k.t.Fatal(err)
	}
	return o
}

// get reads a value through the proxy.
func (k *site) get(name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(k.t.Context(), 20*time.Second)
	defer cancel()
	res, err := pb.NewKVClient(harness.Dial(k.t, k.proxy.Address, nil)).Range(ctx, &pb.RangeRequest{Key: []byte(prefix + name)})
	if err != nil {
		return nil, err
	}
	if len(res.Kvs) != 1 {
		return nil, fmt.Errorf("%d keys", len(res.Kvs))
	}
	if string(res.Kvs[0].Value) != k.env.Sealed.Value(name) {
		return nil, fmt.Errorf("another value")
	}
	return res.Kvs[0].Value, nil
}

func (k *site) mustGet(name string) {
	k.t.Helper()
	if _, err := k.get(name); err != nil {
		k.t.Errorf("read %s: %v", name, err)
	}
}

func names(annotations map[string][]byte) []string {
	var all []string
	for name, value := range annotations {
		all = append(all, fmt.Sprintf("%s=%q", name, value))
	}
	return all
}

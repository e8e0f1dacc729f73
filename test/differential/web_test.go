package differential

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestWebsockets checks that a watch over a websocket receives the same from the proxy, which has
// its own bridge, as from etcd.
func TestWebsockets(t *testing.T) {
	t.Parallel()
	b := newBench(t, "3.7", ruleSets[0])
	if b.proxy == nil {
		t.Skip("it is about the proxy")
	}
	value := b64(b.env.Sealed.Value("watched over a websocket"))
	watch := func(base string, messages ...string) (heard []any) {
		conn, answer, err := websocket.DefaultDialer.DialContext(t.Context(), strings.Replace(base, "http:", "ws:", 1)+"/v3/watch", http.Header{"Sec-WebSocket-Protocol": {"Bearer, token"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		heard = append(heard, answer.StatusCode, answer.Header.Get("Sec-WebSocket-Protocol"))
		if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		hear := func() {
			kind, data, err := conn.ReadMessage()
			var decoded any
			if err != nil || json.Unmarshal(data, &decoded) != nil {
				t.Fatalf("%s: %q, %v", base, data, err)
			}
			heard = append(heard, kind, decoded)
		}
		for _, m := range messages {
			if err := conn.WriteMessage(websocket.TextMessage, []byte(m)); err != nil {
				t.Fatal(err)
			}
		}
		hear()
		hear() // both are created
		ask(t, "POST", base+"/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":%q}`, b64("/s/socket"), value), "")
		hear()
		return heard
	}
	one, two := fmt.Sprintf(`{"create_request":{"key":%q,"watch_id":"1"}}`, b64("/s/socket")), `{"create_request":{"key":"eg==","watch_id":"2"}}`
	for _, messages := range [][]string{{one, two}, {one + two}, {one[:18], one[18:], two}} {
		want, got := watch(b.bareEtcd.URL, messages...), watch("http://"+b.proxy.Address, messages...)
		if !reflect.DeepEqual(want, got) {
			t.Errorf("%q\nbare etcd: %v\nthe proxy: %v", messages, want, got)
		}
	}
}

// TestEtcdServesHTTPElsewhere checks that the proxy uses etcd's separate HTTP port if it is
// configured, and says how to configure it otherwise.
func TestEtcdServesHTTPElsewhere(t *testing.T) {
	t.Parallel()
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %t", secure), func(t *testing.T) {
			t.Parallel()
			env := harness.New(t)
			var ca *harness.CA
			scheme := "http"
			if secure {
				ca, scheme = env.NewCA("all"), "https"
			}
			elsewhere := scheme + "://" + harness.FreeAddress(t)
			etcd := env.StartEtcd(harness.EtcdConfig{CA: ca, Flags: []string{"--listen-client-http-urls", elsewhere}})
			config := func(urls ...string) harness.ProxyConfig {
				cfg := harness.ProxyConfig{Coordination: harness.NoCoordination(), Etcd: harness.Upstream{Endpoints: []string{etcd.URL}, HTTPEndpoints: urls}}
				if secure {
					cfg.Etcd.TLS = &harness.ClientTLS{CAFile: ca.File, CertFile: etcd.Client.CertFile, KeyFile: etcd.Client.KeyFile}
				}
				return cfg
			}
			with, without := env.StartProxy("with", config(elsewhere)), env.StartProxy("without", config())
			with.WaitReady(30 * time.Second)
			without.WaitReady(30 * time.Second)
			for _, path := range []string{"/health", "/livez", "/readyz", "/version", "/metrics"} {
				if a := ask(t, "GET", with.URL()+path, "", ""); a.Status != http.StatusOK {
					t.Errorf("%s: %v", path, a)
				}
				if a := ask(t, "GET", without.URL()+path, "", ""); a.Status != http.StatusBadGateway || !strings.Contains(fmt.Sprint(a.Body), "etcd.httpEndpoints") {
					t.Errorf("%s, not configured: %v", path, a)
				}
			}
			for _, p := range []*harness.Proxy{with, without} {
				if a := ask(t, "POST", p.URL()+"/v3/kv/range", `{"key":"eg=="}`, ""); a.Status != http.StatusOK {
					t.Errorf("the gateway: %v", a)
				}
			}
			if !strings.Contains(without.Log(), "--listen-client-http-urls") {
				t.Error("the log has no word of it")
			}
		})
	}
}

// TestClientsAreRechecked checks that a watch ends when a reload removes its client from
// allowedClients, and when its certificate is revoked, and that the watch of another client
// continues.
func TestClientsAreRechecked(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	ca := env.NewCA("all")
	crl := filepath.Join(env.Dir, "crl.pem")
	ca.Revoke(crl)
	server := ca.Server("proxy")
	etcd := env.StartEtcd(harness.EtcdConfig{})
	proxy := env.StartProxy("proxy", harness.ProxyConfig{
		Coordination: harness.NoCoordination(), Etcd: harness.Upstream{Endpoints: []string{etcd.URL}},
		Listeners: []harness.Listener{{
			Address: harness.FreeAddress(t), AllowedClients: []string{"stays", "leaves", "revoked"},
			TLS: &harness.ServerTLS{CertFile: server.CertFile, KeyFile: server.KeyFile, ClientCAFile: ca.File, ClientCRLFile: crl},
		}},
	})
	proxy.WaitReady(30 * time.Second)
	pairs, ended := make(map[string]harness.Pair), make(map[string]chan error)
	for _, name := range []string{"stays", "leaves", "revoked"} {
		pairs[name] = ca.Client(name, name)
		conn := harness.Dial(t, proxy.Address, ca.ClientTLS(pairs[name]))
		stream, err := pb.NewWatchClient(conn).Watch(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		create := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("k")}}}
		if err := stream.Send(create); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		end := make(chan error, 1)
		ended[name] = end
		go func() { _, err := stream.Recv(); end <- err }()
	}
	ends := func(name string) {
		t.Helper()
		select {
		case err := <-ended[name]:
			if status.Code(err) != codes.Unavailable {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("%s keeps its watch", name)
		}
	}
	file, err := os.ReadFile(proxy.ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(file), `"leaves"`, `"comes"`, 1)
	if err := os.WriteFile(proxy.ConfigFile, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	ends("leaves")
	ca.Revoke(crl, pairs["revoked"])
	ends("revoked")
	select {
	case err := <-ended["stays"]:
		t.Errorf("another client's watch has ended: %v", err)
	default:
	}
}

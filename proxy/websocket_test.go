package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// watchingEtcd answers each create request of a watch with one event, and says which authorization
// a call had.
func watchingEtcd(authorized chan<- string) *proxytest.FakeEtcd {
	etcd := proxytest.EchoEtcd()
	etcd.WatchFn = func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
		if md, _ := metadata.FromIncomingContext(s.Context()); authorized != nil {
			authorized <- strings.Join(md["authorization"], "|")
		}
		for {
			r, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
			k := string(r.GetCreateRequest().GetKey())
			if err := s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte(k), Value: proxytest.Sealed(k, "v")}}}}); err != nil {
				return err
			}
		}
	}
	return etcd
}

func dialSocket(t *testing.T, address, path string, header http.Header) *websocket.Conn {
	t.Helper()
	conn, _, err := websocket.DefaultDialer.DialContext(proxytest.TestContext(t), "ws://"+address+path, header)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetReadDeadline(time.Now().Add(proxytest.Patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func tell(t *testing.T, conn *websocket.Conn, message string) {
	t.Helper()
	if err := conn.WriteMessage(websocket.TextMessage, []byte(message)); err != nil {
		t.Fatal(err)
	}
}

// hear returns the next message.
func hear(t *testing.T, conn *websocket.Conn) string {
	t.Helper()
	kind, data, err := conn.ReadMessage()
	if err != nil || kind != websocket.TextMessage {
		t.Fatalf("message of kind %d: %v", kind, err)
	}
	var b bytes.Buffer
	if err := json.Compact(&b, data); err != nil {
		t.Fatalf("%q: %v", data, err)
	}
	return b.String()
}

// closing returns the code with which the proxy ends a websocket.
func closing(t *testing.T, conn *websocket.Conn) int {
	t.Helper()
	for {
		if _, _, err := conn.ReadMessage(); err != nil {
			if e, ok := errors.AsType[*websocket.CloseError](err); ok {
				return e.Code
			}
			t.Fatal(err)
		}
	}
}

const watchK, eventK = `{"create_request":{"key":"aw=="}}`, `{"result":{"events":[{"kv":{"key":"aw==","value":"dg=="}}]}}`

// TestWebsocket: messages are the body of one request, and the lines of its response are messages.
func TestWebsocket(t *testing.T) {
	authorized := make(chan string, 10)
	p := startProxy(t, proxytest.ServeFake(t, watchingEtcd(authorized)), []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}}, nil)
	address := p.Addrs()[0].String()
	for name, try := range map[string]struct {
		header http.Header
		want   string
	}{
		"no token":    {nil, ""},
		"subprotocol": {http.Header{"Sec-Websocket-Protocol": {"Bearer, a.token"}}, "Bearer a.token"},
		"no space":    {http.Header{"Sec-Websocket-Protocol": {"Bearer,a.token"}}, "Bearer a.token"},
		"cookie":      {http.Header{"Cookie": {"token=another.token"}}, "Bearer another.token"},
		"own header":  {http.Header{"Authorization": {"a.token"}}, ""}, // as etcd has it
	} {
		conn := dialSocket(t, address, "/v3/watch", try.header)
		tell(t, conn, watchK)
		if got := proxytest.Wait(t, authorized, "the watch"); got != try.want {
			t.Errorf("%s: etcd sees the authorization %q", name, got)
		}
		if got := hear(t, conn); got != eventK {
			t.Errorf("%s: %s", name, got)
		}
		tell(t, conn, watchK+watchK) // two in one message
		tell(t, conn, watchK[:18])   // one in three
		tell(t, conn, watchK[18:25])
		tell(t, conn, watchK[25:])
		for range 3 {
			if got := hear(t, conn); got != eventK {
				t.Errorf("%s: %s", name, got)
			}
		}
		conn.Close()
	}
	conn := dialSocket(t, address, "/v3/watch", nil)
	tell(t, conn, `{"create_request":7}`)
	// etcd's gateway says nothing about it
	if code := closing(t, conn); code != websocket.CloseNormalClosure {
		t.Errorf("after what is no request: %d", code)
	}
}

// TestWebsocketLimit: a message is no longer than a request may be, nor is a JSON value that comes
// in many, and the client is told. Nothing of a longer one is kept.
func TestWebsocketLimit(t *testing.T) {
	p := startProxy(t, proxytest.ServeFake(t, watchingEtcd(nil)), []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}}, nil)
	address := p.Addrs()[0].String()
	limit := 2 * (DefaultMaxRequestBytes + 512<<10)
	padded := func(n int) string { return watchK + strings.Repeat(" ", n-len(watchK)) }
	conn := dialSocket(t, address, "/v3/watch", nil)
	for range 3 { // the limit is of each
		tell(t, conn, padded(limit))
		if got := hear(t, conn); got != eventK {
			t.Errorf("a message of the limit's size: %s", got)
		}
	}
	tell(t, conn, padded(limit+1))
	if code := closing(t, conn); code != websocket.CloseMessageTooBig {
		t.Errorf("one byte more: %d", code)
	}
	for name, parts := range map[string][2]string{"an object": {"{", `"a":1,`}, "an array": {"[", "1,"}, "a string": {`"`, "x"}} {
		conn := dialSocket(t, address, "/v3/watch", nil)
		tell(t, conn, parts[0])
		part := strings.Repeat(parts[1], limit/2/len(parts[1]))
		for range 3 {
			if conn.WriteMessage(websocket.TextMessage, []byte(part)) != nil {
				break // the proxy has ended it
			}
		}
		want := websocket.CloseMessageTooBig
		if name == "a string" { // a line ends in it, which JSON does not have
			want = websocket.CloseNormalClosure
		}
		if code := closing(t, conn); code != want {
			t.Errorf("%s in many messages: %d", name, code)
		}
	}

	for name, fragment := range map[string]int{"one frame": 100 << 20, "fragments": 1 << 20} {
		conn := dialSocket(t, address, "/v3/watch", nil)
		tell(t, conn, watchK)
		hear(t, conn)
		piece := make([]byte, 256<<10)
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		sent := 0
		for first := true; sent < 100<<20; first = false {
			if _, err := conn.NetConn().Write(frameHead(fragment, first, sent+fragment >= 100<<20)); err != nil {
				break
			}
			for left := fragment; left > 0; left -= len(piece) {
				if _, err := conn.NetConn().Write(piece); err != nil {
					sent = 100 << 20
					break
				}
			}
			sent += fragment
		}
		if code := closing(t, conn); code != websocket.CloseMessageTooBig {
			t.Errorf("%s: %d", name, code)
		}
		runtime.ReadMemStats(&after)
		// all that was allocated, thrown away or not
		if grown := int64(after.TotalAlloc - before.TotalAlloc); grown > 16<<20 {
			t.Errorf("%s: %d bytes were allocated", name, grown)
		}
	}
}

// frameHead is the head of a client's frame, masked with zeros.
func frameHead(n int, first, last bool) []byte {
	head := []byte{0, 0x80 | 127}
	if first {
		head[0] = websocket.TextMessage
	}
	if last {
		head[0] |= 0x80
	}
	return append(binary.BigEndian.AppendUint64(head, uint64(n)), 0, 0, 0, 0)
}

// TestWebsocketsAtTheEnd: one that has sent nothing holds up no drain, and one that watches is
// told.
func TestWebsocketsAtTheEnd(t *testing.T) {
	p := startProxy(t, proxytest.ServeFake(t, watchingEtcd(nil)), []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}}, nil)
	silent, watches := dialSocket(t, p.Addrs()[0].String(), "/v3/watch", nil), dialSocket(t, p.Addrs()[0].String(), "/v3/watch", nil)
	tell(t, watches, watchK)
	hear(t, watches)
	begun := time.Now()
	stopped := make(chan error, 1)
	go func() { stopped <- p.stop() }()
	// by the gateway or by the end of its call, whichever is first
	if code := closing(t, silent); code != websocket.CloseGoingAway && code != websocket.CloseNormalClosure {
		t.Errorf("one that is silent: %d", code)
	}
	if got := hear(t, watches); !strings.Contains(got, etcdapi.ErrShuttingDown.Error()[len("rpc error: code = Unavailable desc = "):]) {
		t.Errorf("one that watches: %s", got)
	}
	if code := closing(t, watches); code != websocket.CloseNormalClosure {
		t.Errorf("one that watches: %d", code)
	}
	if err := proxytest.Wait(t, stopped, "the end"); err != nil || time.Since(begun) > DefaultDrainTimeout {
		t.Errorf("%v after %v", err, time.Since(begun))
	}
}

// TestWebsocketDenied: a client that is denied gets no websocket, over which it could send.
func TestWebsocketDenied(t *testing.T) {
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	p := startProxy(t, proxytest.ServeFake(t, watchingEtcd(nil)), nil, func(c *Config) {
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File}
		c.Listeners[0].AllowedClients = []string{"friend"}
	})
	for name, want := range map[string]int{"friend": http.StatusSwitchingProtocols, "stranger": http.StatusForbidden} {
		c, k, _ := ca.Issue(name, name)
		pair, err := tls.LoadX509KeyPair(c, k)
		if err != nil {
			t.Fatal(err)
		}
		dialer := websocket.Dialer{
			NetDialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}}}
				return d.DialContext(ctx, network, address)
			},
		}
		conn, answer, err := dialer.DialContext(proxytest.TestContext(t), fmt.Sprintf("wss://%s/v3/watch", p.Addrs()[0]), nil)
		if answer == nil || answer.StatusCode != want {
			t.Errorf("%s: %v, %v", name, answer, err)
		}
		if err == nil {
			conn.Close()
		}
	}
}

package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gorilla/websocket"
	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/etcdserverpb/gw"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	electiongw "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb/gw"
	lockgw "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb/gw"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// noting is an etcd that notes what it is asked. Its KV service is the model's; a watch gets one
// event, of the key as it is; of all else it knows nothing, and answers with nothing.
type noting struct {
	mu    sync.Mutex
	store *etcdmodel.Store
	asked []noted
}

// noted is a message that etcd got.
type noted struct {
	method   string
	msg      []byte
	metadata metadata.MD
}

func (n *noting) begin(store *etcdmodel.Store) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.store, n.asked = store, nil
}

func (n *noting) all() []noted {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.asked)
}

func (n *noting) Serve(_ any, ss grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(ss)
	md, _ := metadata.FromIncomingContext(ss.Context())
	for {
		in := new(rpc.Message)
		if err := ss.RecvMsg(in); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		out, err := n.answer(noted{full, in.Data.Materialize(), md})
		in.Free()
		if err != nil {
			return err
		}
		if err := ss.SendMsg(&rpc.Message{Data: mem.BufferSlice{mem.SliceBuffer(out)}}); err != nil {
			return err
		}
		if full != "/etcdserverpb.Watch/Watch" && full != "/etcdserverpb.Lease/LeaseKeepAlive" {
			return nil
		}
	}
}

func (n *noting) answer(asked noted) ([]byte, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, asked)
	if name, ok := strings.CutPrefix(asked.method, "/etcdserverpb.KV/"); ok && proxytest.KvMethods[name].Request != nil {
		request := proto.Clone(proxytest.KvMethods[name].Request)
		if err := proto.Unmarshal(asked.msg, request); err != nil {
			return nil, err
		}
		answer, err := n.store.Do(request)
		if err != nil {
			return nil, err
		}
		return proto.Marshal(answer)
	}
	if asked.method == "/etcdserverpb.Watch/Watch" {
		var request pb.WatchRequest
		if err := proto.Unmarshal(asked.msg, &request); err != nil {
			return nil, err
		}
		found, err := n.store.Do(&pb.RangeRequest{Key: request.GetCreateRequest().GetKey()})
		if err != nil {
			return nil, err
		}
		answer := &pb.WatchResponse{Created: true}
		kvs, _ := found.(*pb.RangeResponse)
		for _, kv := range kvs.GetKvs() {
			answer.Events = append(answer.Events, &mvccpb.Event{Kv: kv, PrevKv: kv})
		}
		return proto.Marshal(answer)
	}
	return nil, nil
}

// etcdsGateway is the gateway as etcd sets it up, without websockets.
func etcdsGateway(f *testing.F, conn *grpc.ClientConn) http.Handler {
	inner := &runtime.JSONPb{MarshalOptions: protojson.MarshalOptions{UseProtoNames: true}, UnmarshalOptions: protojson.UnmarshalOptions{DiscardUnknown: true}}
	api := runtime.NewServeMux(runtime.WithMarshalerOption(runtime.MIMEWildcard, &runtime.HTTPBodyMarshaler{Marshaler: inner}))
	for _, register := range []func(context.Context, *runtime.ServeMux, *grpc.ClientConn) error{
		gw.RegisterKVHandler, gw.RegisterWatchHandler, gw.RegisterLeaseHandler, gw.RegisterClusterHandler, gw.RegisterMaintenanceHandler, gw.RegisterAuthHandler,
		lockgw.RegisterLockHandler, electiongw.RegisterElectionHandler,
	} {
		if err := register(f.Context(), api, conn); err != nil {
			f.Fatal(err)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("/v3/", api)
	return mux
}

// gateways are etcd's own and the proxy's, each before an etcd.
type gateways struct {
	own, proxys  http.Handler
	bare, behind *noting
	core         *etcdapi.Core
	identity     *listener.Identity
}

func newGateways(f *testing.F) *gateways {
	g := &gateways{bare: new(noting), behind: new(noting)}
	conn := proxytest.Dial(f, proxytest.ServeAll(f, g.bare.Serve), grpc.WithTransportCredentials(proxytest.InsecureCredentials()), grpc.WithDisableRetry())
	g.own = etcdsGateway(f, conn)
	p := startProxy(f, proxytest.ServeAll(f, g.behind.Serve), systemRules(), nil)
	g.core, g.proxys = p.core, p.gateway.Handler
	g.identity = &listener.Identity{Upstream: p.upstream}
	return g
}

// begin gives both an etcd that holds the same.
func (g *gateways) begin(t *testing.T) {
	bare, behind := etcdmodel.New(128, etcdmodel.Leases...), etcdmodel.New(128, etcdmodel.Leases...)
	for _, pair := range [][2]string{{"s/a", "beta"}, {"s/b", "alpha"}, {"s/c", ""}, {"t", "theta"}, {"s", "sigma"}, {"s/a", "alpha"}} {
		key, value := pair[0], pair[1]
		stored, err := g.core.Rules.Load().Seal(t.Context(), []byte{}, []byte(key), []byte(value))
		if err != nil {
			t.Fatal(err)
		}
		if stored == nil {
			stored = []byte(value)
		}
		if _, err := bare.Do(&pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
		if _, err := behind.Do(&pb.PutRequest{Key: []byte(key), Value: stored}); err != nil {
			t.Fatal(err)
		}
	}
	g.bare.begin(bare)
	g.behind.begin(behind)
}

// told is what a client of HTTP is told.
type told struct {
	status int
	header http.Header
	body   string
}

func (g *gateways) tell(h http.Handler, r *http.Request, body string) told {
	r = r.Clone(listener.WithIdentity(r.Context(), g.identity))
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return told{w.Code, w.Header(), w.Body.String()}
}

// fuzzedRequest returns nil for what is no request.
func fuzzedRequest(ctx context.Context, method, path, headers string) *http.Request {
	u, err := url.ParseRequestURI(path)
	if err != nil || !strings.HasPrefix(path, "/") {
		return nil
	}
	header, err := textproto.NewReader(bufio.NewReader(strings.NewReader(headers + "\r\n\r\n"))).ReadMIMEHeader()
	if err != nil {
		return nil
	}
	header.Del("Grpc-Timeout") // which of the two comes to its end is chance
	r := &http.Request{
		Method: method, URL: u, RequestURI: path, Header: http.Header(header), Host: "etcd", RemoteAddr: "127.0.0.1:1",
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	return r.WithContext(ctx)
}

// hosted reports whether the proxy may run the service itself that a message is for.
func (g *gateways) hosted(asked noted) bool {
	service, name, _ := strings.Cut(strings.TrimPrefix(asked.method, "/"), "/")
	if service != "v3electionpb.Election" && service != "v3lockpb.Lock" {
		return false
	}
	named, led := new(v3electionpb.LeaderRequest), new(v3electionpb.ProclaimRequest)
	var key []byte
	switch name {
	case "Proclaim", "Resign":
		if proto.Unmarshal(asked.msg, led) != nil {
			return true
		}
		key = led.GetLeader().GetKey()
	default:
		if proto.Unmarshal(asked.msg, named) != nil {
			return true
		}
		key = append(named.GetName(), '/')
	}
	return bytes.HasPrefix(key, []byte("s/")) || bytes.HasPrefix([]byte("s/"), key)
}

// fromBrowser reports whether a request may be one of a browser's, which the proxy treats as such.
func fromBrowser(r *http.Request) bool {
	agent := r.Header.Get("User-Agent")
	return r.Header.Get("Sec-Fetch-Site") != "" || len(r.Header["Origin"]) > 0 || strings.HasPrefix(agent, "Mozilla/") || strings.HasPrefix(agent, "Opera/")
}

// FuzzGateway: whatever a client of the JSON gateway says, it is told the same by the proxy as by
// etcd; the same is stored, no value under a rule in the clear, and etcd gets the client's
// metadata.
func FuzzGateway(f *testing.F) {
	g := newGateways(f)
	b := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for _, seed := range [][2]string{
		{"/v3/kv/put", `{"key":"` + b("s/a") + `","value":"` + b("a secret") + `","prev_kv":true}`},
		{"/v3/kv/put", `{"key":"` + b("t") + `","value":"` + b("no secret") + `","lease":"1"}`},
		{"/v3/kv/range", `{"key":"` + b("s/") + `","range_end":"` + b("s0") + `","sort_target":"VALUE","sort_order":"DESCEND","limit":"2"}`},
		{"/v3/kv/range", `{"key":"AA==","range_end":"AA==","keys_only":true}`},
		{"/v3/kv/deleterange", `{"key":"` + b("s/") + `","range_end":"` + b("s0") + `","prev_kv":true}`},
		{"/v3/kv/txn", `{"compare":[{"target":"VALUE","key":"` + b("s/a") + `","value":"` + b("alpha") + `"}],"success":[{"request_put":{"key":"` + b("s/b") + `","value":"` + b("new") +
			`","prev_kv":true}},{"request_range":{"key":"` + b("s/a") + `"}}],"failure":[{"request_delete_range":{"key":"` + b("s/c") + `"}},{"request_txn":{"compare":[{"result":"GREATER","target":"VERSION","version":"1"}]}}]}`},
		{"/v3/kv/compaction", `{"revision":"3","physically":[1]}`},
		{"/v3/watch", `{"create_request":{"key":"` + b("s/a") + `","prev_kv":true}}` + "\n" + `{"create_request":{"key":"` + b("t") + `"}}`},
		{"/v3/lease/grant", `{"TTL":"60","ID":"7"}`},
		{"/v3/lease/keepalive", `{"ID":"7"}{"ID":"8"}`},
		{"/v3/cluster/member/list", `{}`},
		{"/v3/auth/authenticate", `{"name":"root","password":"pw"}`},
		{"/v3/lock/lock", `{"name":"` + b("t") + `"}`},
		{"/v3/election/observe", `{"name":"` + b("t") + `"}`},
		{"/v3/kv/../kv/put?key=x", `[]`},
		{"/v3/kv/range", `{"key":`},
		{"/v3/kv/range/", ``},
	} {
		f.Add("POST", seed[0], "Authorization: token\r\nContent-Type: application/json", seed[1])
	}
	f.Add("GET", "/v3/kv/range?key=cy9h", "Grpc-Metadata-X: y\r\nAccept: application/grpc", "")
	f.Fuzz(func(t *testing.T, method, path, headers, body string) {
		ctx, cancel := context.WithTimeout(t.Context(), proxytest.Patience)
		defer cancel()
		r := fuzzedRequest(ctx, method, path, headers)
		if r == nil || slices.ContainsFunc([]string{"/health", "/livez", "/readyz", "/version", "/metrics"}, func(own string) bool { return strings.HasPrefix(r.URL.Path, own) }) {
			return // what etcd itself says is not of the gateway
		}
		if websocket.IsWebSocketUpgrade(r) || fromBrowser(r) || r.Method == http.MethodOptions {
			return // what is there for browsers is the proxy's own
		}
		g.begin(t)
		want := g.tell(g.own, r, body)
		bare := g.bare.all()
		if slices.ContainsFunc(bare, func(n noted) bool { return g.hosted(n) }) {
			return
		}
		got := g.tell(g.proxys, r, body)
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(told{})); diff != "" {
			t.Fatalf("%s %q %q %q (-want +got):\n%s", method, path, headers, body, diff)
		}
		behind := g.behind.all()
		for _, n := range behind {
			if name, ok := strings.CutPrefix(n.method, "/etcdserverpb.KV/"); ok {
				request := proto.Clone(proxytest.KvMethods[name].Request)
				if err := proto.Unmarshal(n.msg, request); err != nil {
					t.Fatal(err)
				}
				if err := proxytest.CheckSealed(g.core.Rules.Load(), request); err != nil {
					t.Fatal(err)
				}
			}
		}
		if len(bare) > 0 && len(behind) > 0 {
			for _, name := range []string{"authorization", "token", "x", "x-forwarded-for", "x-forwarded-host"} {
				if want, got := bare[0].metadata[name], behind[len(behind)-1].metadata[name]; !slices.Equal(want, got) {
					t.Fatalf("metadata %s: %q, want %q", name, got, want)
				}
			}
		}
		proxytest.SameStored(t, g.core.Rules.Load(), g.bare.store, g.behind.store)
	})
}

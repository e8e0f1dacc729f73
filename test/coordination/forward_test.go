package coordination

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// forward is a forward proxy, as named by HTTPS_PROXY. It records the hosts of CONNECT requests,
// connects to those that it allows, and refuses all others.
type forward struct {
	listener net.Listener
	allowed  []string

	mu    sync.Mutex
	asked map[string]int
}

func startForward(t *testing.T, allowed ...string) *forward {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &forward{listener: l, allowed: allowed, asked: make(map[string]int)}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(conn)
		}
	}()
	return f
}

func (f *forward) serve(conn net.Conn) {
	defer conn.Close()
	from := bufio.NewReader(conn)
	request, err := http.ReadRequest(from)
	if err != nil {
		return
	}
	f.mu.Lock()
	f.asked[request.Method+" "+request.Host]++
	f.mu.Unlock()
	if request.Method != http.MethodConnect || !slices.Contains(f.allowed, request.Host) {
		fmt.Fprint(conn, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
		return
	}
	to, err := net.Dial("tcp", request.Host)
	if err != nil {
		return
	}
	defer to.Close()
	fmt.Fprint(conn, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		_, _ = io.Copy(to, from)
		to.Close()
	}()
	_, _ = io.Copy(conn, to)
}

// hosts returns the requested hosts.
func (f *forward) hosts() (all []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for host := range f.asked {
		all = append(all, host)
	}
	slices.Sort(all)
	return all
}

// TestForwardProxy checks that the proxy and its commands use HTTPS_PROXY only for the KMS and STS
// of the cloud. The name of etcd in the configuration is one that Go's own exceptions for loopback
// do not cover, and the forward proxy that refuses it must get no request for it.
func TestForwardProxy(t *testing.T) { // not parallel: it sets environment variables
	s := newSite(t)
	double := s.NewAlibaba()
	sts := kmsdouble.NewSTS(t, kmsdouble.STSConfig{Register: func(k kmsdouble.AccessKey) {
		s.Sealed.Add("the secret of a session", []byte(k.Secret))
		double.SetAccessKey(k)
	}})
	cloud := s.AlibabaKey("cloud", double)
	named := func(endpoint string) string {
		_, port, err := net.SplitHostPort(endpoint)
		if err != nil {
			t.Fatal(err)
		}
		return net.JoinHostPort("LOCALHOST", port)
	}
	cloud.Alibaba.Endpoint = named(double.Endpoint())
	cloud.Alibaba.Credentials.Type, cloud.Alibaba.Credentials.RoleARN = "assumeRole", kmsdouble.DefaultRoleARN
	cloud.Alibaba.Credentials.STSEndpoint, cloud.Alibaba.Credentials.STSCAFile = named(sts.Endpoint()), sts.CAFile()
	f := startForward(t, named(double.Endpoint()), named(sts.Endpoint()))
	for _, name := range []string{"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy"} {
		t.Setenv(name, "http://"+f.listener.Addr().String())
	}
	t.Setenv("NO_PROXY", "")
	t.Setenv("no_proxy", "")

	plugin := s.StartPlugin("plugin", "dev", s.cfg.KMS[0])
	s.cfg.KMS = append(s.cfg.KMS, cloud, harness.KMSConfig{Name: "socket", Plugin: &harness.PluginKMS{Endpoint: plugin.Socket}})
	s.cfg.Rules[0].WriteWith, s.cfg.Rules[0].Recovery, s.cfg.Rules[0].RecoveryRequired = "cloud", []string{"socket"}, true
	s.cfg.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "audit.jsonl")}
	s.cfg.Etcd.Endpoints = []string{"http://" + named(s.etcd.Address), "http://" + strings.Replace(s.etcd.Address, "127.0.0.1", "0.0.0.0", 1)}
	for name, args := range map[string][]string{"reencrypts": {"--reencrypt"}, "scans": {"--scan-interval", "1s"}} {
		p := s.NewProxy(name, s.cfg)
		p.Args = args
		p.Start()
		p.WaitReady(within)
		kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
		if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + "a"), Value: []byte(s.Sealed.Value("a"))}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		compare := &pb.Compare{Key: []byte(prefix + "a"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("other")}}
		if _, err := kv.Txn(t.Context(), &pb.TxnRequest{Compare: []*pb.Compare{compare}}); err != nil {
			t.Errorf("%s: compare by value: %v", name, err)
		}
		if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + name), Value: []byte("in the clear")}); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, within, "the watch for plaintext", func() error {
			if !strings.Contains(p.Report(), "[-]bypass") {
				return fmt.Errorf("it reports %s", p.Report())
			}
			return nil
		})
		for _, path := range []string{"/health", "/version", "/metrics"} {
			conn, err := net.Dial("tcp", p.Address)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: %s\r\n\r\n", path, p.Address)
			if answer, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || answer.StatusCode != http.StatusOK {
				t.Errorf("%s: %s: %v, %v", name, path, answer, err)
			}
			conn.Close()
		}
		s.agreed(t, prefix)
		for _, args := range [][]string{{"status"}, {"reencrypt"}, {"verify"}, {"purge", "--yes"}, {"kms", "check"}} {
			if out, code := s.Run(append(args, "--config", p.ConfigFile)...); code != 0 && code != 1 {
				t.Errorf("%s: %q: exit code %d: %s", name, args, code, out)
			}
		}
		p.Stop(within)
	}
	want := []string{"CONNECT " + named(double.Endpoint()), "CONNECT " + named(sts.Endpoint())}
	slices.Sort(want)
	if got := f.hosts(); !slices.Equal(got, want) {
		t.Errorf("the forward proxy was asked for %q, want %q", got, want)
	}
}

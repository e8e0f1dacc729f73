package coordination

import (
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const leadsToProxy = "etcd.endpoints leads to a proxy"

// TestCommandsWantEtcd: a command that is pointed at a proxy seals nothing twice and decides nothing; it says what is wrong.
func TestCommandsWantEtcd(t *testing.T) {
	t.Parallel()
	for name, coordination := range map[string]*harness.Coordination{"alone": harness.NoCoordination(), "coordinated": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.cfg.Coordination = coordination
			p := s.StartProxy("proxy", s.cfg)
			p.WaitReady(within)
			kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
			value := s.Sealed.Value("a")
			if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + "a"), Value: []byte(value)}); err != nil {
				t.Fatal(err)
			}
			wrong := s.cfg
			wrong.Etcd.Endpoints = []string{p.URL()}
			file := s.NewProxy("wrong", wrong).ConfigFile
			for _, args := range [][]string{{"status"}, {"reencrypt"}, {"reencrypt", "--ignore-proxies"}, {"purge", "--yes"}, {"verify"}} {
				out, code := s.Run(append(args, "--config", file)...)
				if code != 3 || !strings.Contains(out, leadsToProxy) || !strings.Contains(out, "hint: name etcd itself") {
					t.Errorf("%q: exit code %d: %s", args, code, out)
				}
			}
			r, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(prefix + "a")})
			if err != nil || string(r.Kvs[0].Value) != value {
				t.Errorf("the value through the proxy: %v, %v", r, err)
			}
		})
	}
}

// TestProxyBehindProxy: a proxy whose etcd is a proxy does not serve, also if it finds that out late.
func TestProxyBehindProxy(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	first := s.StartProxy("first", s.cfg)
	first.WaitReady(within)
	s.agreed(t, prefix)
	first.Stop(within)
	second := s.cfg
	second.Etcd.Endpoints = []string{first.URL()}
	p := s.StartProxy("second", second) // with nothing behind it yet
	first.Start()
	if code := p.Wait(within); code != 3 || !strings.Contains(p.Log(), leadsToProxy) {
		t.Errorf("exit code %d: %s", code, p.Log())
	}
	second.Coordination = harness.NoCoordination()
	if out, code := s.Run("serve", "--config", s.NewProxy("third", second).ConfigFile); code != 3 || !strings.Contains(out, leadsToProxy) {
		t.Errorf("without coordination: exit code %d: %s", code, out)
	}
}

// TestProxyInsteadOfEtcd: nothing is sealed twice either when a proxy takes etcd's place while another one serves.
func TestProxyInsteadOfEtcd(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cfg.Coordination = harness.NoCoordination()
	other := s.StartEtcd(harness.EtcdConfig{Name: "other"})
	outer := s.cfg
	outer.Etcd.Endpoints = []string{other.URL}
	p := s.StartProxy("outer", outer)
	p.WaitReady(within)
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	put := func() error {
		_, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + "a"), Value: []byte(s.Sealed.Value("a"))})
		return err
	}
	if err := put(); err != nil {
		t.Fatal(err)
	}
	other.Stop(within)
	inner := s.cfg
	inner.Listeners = []harness.Listener{{Address: other.Address}}
	s.StartProxy("inner", inner).WaitReady(within)
	harness.Eventually(t, within, "the put to be refused", func() error {
		switch err := put(); status.Code(err) {
		case codes.Unavailable:
			return err
		case codes.FailedPrecondition:
			if !strings.Contains(err.Error(), leadsToProxy) {
				t.Errorf("the error is %v", err)
			}
		default:
			t.Errorf("the put: %v", err)
		}
		return nil
	})
	if got := s.get(t, prefix+"a"); got != "" {
		t.Errorf("etcd holds %q", got)
	}
}

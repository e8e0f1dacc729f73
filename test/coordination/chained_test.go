package coordination

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const leadsToProxy = "etcd.endpoints leads to a proxy"

// TestCommandsWantEtcd checks that a command whose endpoint is a proxy encrypts nothing twice,
// changes nothing, and reports the mistake.
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

// TestProxyBehindProxy checks that a proxy whose etcd is a proxy does not serve, even if it finds
// out later.
func TestProxyBehindProxy(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	first := s.StartProxy("first", s.cfg)
	first.WaitReady(within)
	s.agreed(t, prefix)
	first.Stop(within)
	second := s.cfg
	second.Etcd.Endpoints = []string{first.URL()}
	p := s.StartProxy("second", second) // nothing listens there yet
	first.Start()
	if code := p.Wait(within); code != 3 || !strings.Contains(p.Log(), leadsToProxy) {
		t.Errorf("exit code %d: %s", code, p.Log())
	}
	second.Coordination = harness.NoCoordination()
	if out, code := s.Run("serve", "--config", s.NewProxy("third", second).ConfigFile); code != 3 || !strings.Contains(out, leadsToProxy) {
		t.Errorf("without coordination: exit code %d: %s", code, out)
	}
}

// TestProxyInsteadOfEtcd checks that nothing is encrypted twice if a proxy replaces etcd while
// another proxy serves.
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

// startGRPCProxy starts etcd's own proxy, which sends its own requests for those that it gets, in
// front of an etcd or a proxy. It returns its address.
func (s *site) startGRPCProxy(t *testing.T, name, upstream string, flags ...string) string {
	t.Helper()
	address := harness.FreeAddress(t)
	args := []string{"grpc-proxy", "start", "--endpoints", upstream, "--listen-addr", address, "--advertise-client-url", address, "--data-dir", filepath.Join(s.Dir, name)}
	s.StartTool(name, "etcd-3.7", append(args, flags...)...)
	conn := harness.Dial(t, address, nil)
	harness.Eventually(t, within, name+" to be there", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("\x00"), Serializable: true})
		return err
	})
	return address
}

// TestProxyBehindGRPCProxy checks that a proxy, and a command, detect that their etcd is a proxy
// also if etcd's grpc-proxy is between them, and that nothing is encrypted twice.
func TestProxyBehindGRPCProxy(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{"plain": nil, "namespace": {"--namespace", "/below"}, "ordered": {"--experimental-serializable-ordering"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			inner := s.StartProxy("inner", s.cfg)
			inner.WaitReady(within)
			s.agreed(t, prefix)
			between := s.startGRPCProxy(t, "grpc-proxy", inner.Address, flags...)
			for alone, coordination := range map[string]*harness.Coordination{"alone": harness.NoCoordination(), "coordinated": nil} {
				outer := s.cfg
				outer.Etcd.Endpoints, outer.Coordination = []string{"http://" + between}, coordination
				p := s.NewProxy("outer-"+alone, outer)
				if out, code := s.Run("serve", "--config", p.ConfigFile); code != 3 || !strings.Contains(out, leadsToProxy) {
					t.Errorf("%s: exit code %d: %s", alone, code, out)
				}
				for _, args := range [][]string{{"status"}, {"reencrypt"}, {"purge", "--yes"}, {"verify"}} {
					if out, code := s.Run(append(args, "--config", p.ConfigFile)...); code != 3 || !strings.Contains(out, leadsToProxy) {
						t.Errorf("%s: %q: exit code %d: %s", alone, args, code, out)
					}
				}
			}
		})
	}
}

// TestProxyComesBehindGRPCProxy checks that a proxy that serves through grpc-proxy stops when a
// proxy replaces the etcd behind it.
func TestProxyComesBehindGRPCProxy(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	other := s.StartEtcd(harness.EtcdConfig{Name: "other"})
	between := s.startGRPCProxy(t, "grpc-proxy", other.Address)
	outer := s.cfg
	outer.Etcd.Endpoints = []string{"http://" + between}
	p := s.StartProxy("outer", outer)
	p.WaitReady(within)
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + "a"), Value: []byte(s.Sealed.Value("a"))}); err != nil {
		t.Fatal(err) // etcd's grpc-proxy alone is no reason to refuse
	}
	other.Stop(within)
	inner := s.cfg
	inner.Listeners = []harness.Listener{{Address: other.Address}}
	s.StartProxy("inner", inner).WaitReady(within)
	if code := p.Wait(2 * within); code != 3 || !strings.Contains(p.Log(), leadsToProxy) {
		t.Errorf("exit code %d: %s", code, p.Log())
	}
}

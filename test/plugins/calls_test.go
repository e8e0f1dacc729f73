package plugins

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// resources are what kube-apiserver encrypts with one plugin each.
var resources = []string{
	"secrets", "configmaps", "serviceaccounts", "endpoints", "podtemplates", "limitranges", "resourcequotas", "replicationcontrollers", "persistentvolumes",
}

// callLengths returns how long calls are counted at rest, and in an outage. `make soak` sets SOAK.
func callLengths(t *testing.T) (rest, outage time.Duration) {
	t.Helper()
	if os.Getenv("SOAK") != "" {
		return 6 * time.Minute, 2 * time.Minute
	}
	if testing.Short() {
		t.Skip("both sides poll once a minute, so that it takes minutes")
	}
	// At rest, the proxy has at most 10 calls in four minutes (a Status and a Decrypt per minute),
	// and kube-apiserver at least 11 (a Status for each probe after 20 seconds).
	return 4 * time.Minute, 2 * time.Minute
}

// calls are those of one client to a plugin, and of the plugin to its vendor.
type calls struct{ status, encrypt, decrypt, vendor int }

func callsOf(p *kmstest.Persona) calls {
	return calls{p.Calls("Status"), p.Calls("Encrypt"), p.Calls("Decrypt"), p.VendorCalls()}
}

func (c calls) since(before calls) calls {
	return calls{c.status - before.status, c.encrypt - before.encrypt, c.decrypt - before.decrypt, c.vendor - before.vendor}
}

func (c calls) plugin() int { return c.status + c.encrypt + c.decrypt }

func (c calls) String() string {
	return fmt.Sprintf("Status %d, Encrypt %d, Decrypt %d, at the vendor %d", c.status, c.encrypt, c.decrypt, c.vendor)
}

// TestCalls counts the calls of the proxy and of kube-apiserver to the same plugins, at the same
// time: at rest, and while the plugins' vendors are down. The API server is probed as the kubelet
// probes the static Pod of kubeadm, because each probe may call the plugin.
func TestCalls(t *testing.T) {
	rest, outage := callLengths(t)
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{})
	var ours, theirs []*kmstest.Persona
	var cfg harness.ProxyConfig
	encryption := "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n"
	personalities := usable()
	if len(personalities) > len(resources) {
		t.Fatalf("%d plugins, and %d resources", len(personalities), len(resources))
	}
	for i, p := range personalities {
		own, other := kmstest.NewPersona(p), kmstest.NewPersona(p)
		ours, theirs = append(ours, own), append(theirs, other)
		cfg.KMS = append(cfg.KMS, harness.KMSConfig{Name: p.Name, Plugin: &harness.PluginKMS{Endpoint: kmstest.PluginServer(t, own)}})
		cfg.Rules = append(cfg.Rules, harness.Rule{Prefix: "/" + p.Name + "/", WriteWith: p.Name})
		encryption += fmt.Sprintf("- resources: [%s]\n  providers:\n  - kms: {apiVersion: v2, name: %s, endpoint: %s, timeout: 3s}\n", resources[i], p.Name, kmstest.PluginServer(t, other))
	}
	cfg.Etcd = harness.Upstream{Endpoints: []string{etcd.URL}}
	proxy := env.StartProxy("proxy", cfg)
	api := env.NewAPIServer(harness.APIServerConfig{EtcdServers: etcd.URL, EncryptionConfig: env.File("encryption.yaml", []byte(encryption))})
	api.Start()
	api.WaitReady(3 * time.Minute) // it creates its first objects with nine plugins
	proxy.WaitReady(time.Minute)

	ctx, stop := context.WithCancel(t.Context())
	probed := make(chan struct{})
	go func() {
		defer close(probed)
		probe(ctx, api)
	}()
	defer func() { stop(); <-probed }()

	for _, phase := range []struct {
		name   string
		length time.Duration
		outage bool
	}{{"at rest", rest, false}, {"in an outage", outage, true}} {
		for i := range personalities {
			ours[i].SetOutage(phase.outage)
			theirs[i].SetOutage(phase.outage)
		}
		own, other := all(ours), all(theirs)
		// This is no wait for a condition: the length is what is measured.
		time.Sleep(phase.length)
		ownAfter, otherAfter := all(ours), all(theirs)
		for i, p := range personalities {
			o, k := ownAfter[i].since(own[i]), otherAfter[i].since(other[i])
			t.Logf("%s for %v, %s: the proxy: %v; kube-apiserver: %v", phase.name, phase.length, p.Name, o, k)
			if o.plugin() == 0 || k.plugin() == 0 {
				t.Errorf("%s, %s: nothing was counted", phase.name, p.Name)
			}
			most := k.plugin()
			if phase.outage && k.vendor == 0 {
				// The Status of this plugin does not ask the vendor, so that kube-apiserver does
				// not notice the outage. The proxy does, and then checks every 10 seconds.
				most = 2 * int(phase.length/(10*time.Second)+1)
			}
			if o.plugin() > most {
				t.Errorf("%s, %s: the proxy made %d calls; want %d at most, and kube-apiserver made %d", phase.name, p.Name, o.plugin(), most, k.plugin())
			}
		}
	}
}

// probe requests what the kubelet does for the static Pod of kubeadm, as often, until ctx ends.
func probe(ctx context.Context, api *harness.APIServer) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 0; ; n++ {
		paths := []string{"/readyz"}
		if n%10 == 0 {
			paths = append(paths, "/livez")
		}
		for _, path := range paths {
			// The response may be a failure: it is the request that counts.
			_ = api.Client.RESTClient().Get().AbsPath(path).Do(ctx).Error()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func usable() (list []kmstest.Personality) {
	for _, p := range kmstest.Personalities() {
		if p.Unusable == "" {
			list = append(list, p)
		}
	}
	return list
}

func all(personas []*kmstest.Persona) (list []calls) {
	for _, p := range personas {
		list = append(list, callsOf(p))
	}
	return list
}

// TestCallsAreListed: the page has a row of each plugin that TestCalls measures.
func TestCallsAreListed(t *testing.T) {
	page, err := os.ReadFile("../../docs/plugins/calls.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range usable() {
		if !strings.Contains(string(page), "\n| "+p.Name+" |") {
			t.Errorf("docs/plugins/calls.md has no row of %s", p.Name)
		}
	}
}

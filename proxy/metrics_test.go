package proxy

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// series returns what a registry shows of one metric.
func series(t *testing.T, r prometheus.Gatherer, name string) []*dto.Metric {
	t.Helper()
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == name {
			return f.GetMetric()
		}
	}
	return nil
}

// TestAddedLatency: one in sampleEvery unary calls of a connection is measured and the second, and neither the time that etcd takes counts, nor that of calls that etcd did not answer.
func TestAddedLatency(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		const slow = 200 * time.Millisecond // etcd's answer to the key "slow"
		etcd := serveFake(t, &fakeEtcd{
			rangeFn: func(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
				if string(r.Key) == "slow" {
					time.Sleep(slow)
				}
				return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: r.Key, Value: sealed(string(r.Key), "v")}}}, nil
			},
		})
		r := prometheus.NewRegistry()
		p := startProxy(t, etcd, everything, func(c *Config) {
			c.Registerer = r
		})
		conn := p.dial(t)
		kv := pb.NewKVClient(conn)
		get := func(key string) {
			t.Helper()
			if _, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)}); err != nil {
				t.Fatal(err)
			}
		}
		histogram := func() *dto.Histogram {
			t.Helper()
			all := series(t, r, "etcd_kms_proxy_added_latency_seconds")
			if len(all) != 1 {
				t.Fatalf("there are %d series", len(all))
			}
			return all[0].GetHistogram()
		}
		if n := histogram().GetSampleCount(); n != 0 {
			t.Fatalf("%d calls before the first", n)
		}
		get("first") // may wait for the connection to etcd, and does not count then
		get("second")
		first := histogram().GetSampleCount()
		if first == 0 {
			t.Error("neither the first nor the second call is measured")
		}
		for range sampleEvery - 2 {
			get("k")
		}
		if n := histogram().GetSampleCount(); n != first {
			t.Errorf("%d of the first %d calls are measured, want %d", n, sampleEvery, first)
		}
		before := histogram().GetSampleSum()
		get("slow")
		h := histogram()
		if n := h.GetSampleCount(); n != first+1 {
			t.Fatalf("%d calls are measured after %d, want %d", n, sampleEvery+1, first+1)
		}
		if added := h.GetSampleSum() - before; added <= 0 || added >= slow.Seconds() {
			t.Errorf("a call that etcd took %v for has %v s added", slow, added)
		}
		if len(h.GetBucket()) == 0 || h.Schema == nil {
			t.Error("there are no classic buckets, or no native ones")
		}
	})
}

// TestStopwatch: what goes on while it stands does not count, and what was discarded is not shown.
func TestStopwatch(t *testing.T) {
	m, err := newMetrics(nil)
	if err != nil {
		t.Fatal(err)
	}
	h := m.added
	count := func() uint64 {
		var m dto.Metric
		if err := h.Write(&m); err != nil {
			t.Fatal(err)
		}
		return m.GetHistogram().GetSampleCount()
	}
	var off stopwatch
	off.start()
	off.observe(h)
	discarded := stopwatch{on: true}
	discarded.start()
	discarded.discard()
	discarded.stop()
	discarded.start()
	discarded.observe(h)
	if n := count(); n != 0 {
		t.Errorf("%d observations of what was off or discarded", n)
	}
	on := stopwatch{on: true}
	on.start()
	on.stop()
	on.start()
	on.start() // goes on
	on.observe(h)
	on.start()
	on.observe(h) // was observed
	if n := count(); n != 1 {
		t.Errorf("%d observations, want 1", n)
	}
	allocated := testing.AllocsPerRun(1000, func() {
		w := stopwatch{on: true}
		w.start()
		w.stop()
		w.start()
		w.observe(h)
	})
	if allocated != 0 {
		t.Errorf("measuring a call takes %v allocations", allocated)
	}
}

// TestCertificateExpiry: the metric shows the files in use, and follows them.
func TestCertificateExpiry(t *testing.T) {
	ca, clients := newAuthority(t, "ca"), newAuthority(t, "clients")
	cert, key, leaf := ca.issueFor(20*time.Minute, "server", "server")
	mine, mineKey, forEtcd := clients.issueFor(30*time.Minute, "proxy", "")
	r := prometheus.NewRegistry()
	at := func(address string) ListenerConfig {
		return ListenerConfig{Address: address, TLS: &ListenerTLS{CertFile: cert, KeyFile: key, ClientCAFile: clients.file}}
	}
	p, err := New(Config{
		// Two with one address must not spoil the metrics.
		Listeners:  []ListenerConfig{at("127.0.0.1:0"), at("127.0.0.1:0"), {Address: "localhost:0"}},
		Upstream:   UpstreamConfig{Endpoints: []string{"https://127.0.0.1:1"}, TLS: &UpstreamTLS{CAFile: ca.file, CertFile: mine, KeyFile: mineKey}},
		Registerer: r,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	expect := func(what string, want map[[2]string]*x509.Certificate) {
		t.Helper()
		all := series(t, r, "etcd_kms_proxy_certificate_expiry_timestamp_seconds")
		if len(all) != len(want) {
			t.Errorf("%s: %d series, want %d", what, len(all), len(want))
		}
		for _, m := range all {
			labels := make(map[string]string)
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if c := want[[2]string{labels["use"], labels["listener"]}]; c == nil || m.GetGauge().GetValue() != float64(c.NotAfter.Unix()) {
				t.Errorf("%s: %v is %v", what, labels, m.GetGauge().GetValue())
			}
		}
	}
	want := map[[2]string]*x509.Certificate{
		{"listener", "127.0.0.1:0"}: leaf, {"listener_client_ca", "127.0.0.1:0"}: clients.cert, {"etcd_client", ""}: forEtcd, {"etcd_ca", ""}: ca.cert,
	}
	expect("at first", want)

	_, _, want[[2]string{"listener", "127.0.0.1:0"}] = ca.issueFor(40*time.Minute, "server", "server")
	_, _, want[[2]string{"etcd_client", ""}] = clients.issueFor(50*time.Minute, "proxy", "")
	expect("after they were renewed", want)

	replace(t, cert, []byte("not a certificate"))
	expect("while a file is damaged", want)

	// A chain ends with the first of its certificates that does; a CA file with the last.
	_, _, long := ca.issueFor(2*time.Hour, "server", "server")
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: long.Raw}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})...)
	replace(t, cert, chain)
	_, _, later := clients.issueFor(3*time.Hour, "later", "later")
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: clients.cert.Raw}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: later.Raw})...)
	replace(t, clients.file, both)
	want[[2]string{"listener", "127.0.0.1:0"}] = ca.cert
	want[[2]string{"listener_client_ca", "127.0.0.1:0"}] = later
	expect("with a chain and two CAs", want)
}

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

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
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

// TestAddedLatency: one in 16 unary calls of a connection is measured and the second, and neither
// the time that etcd takes counts, nor that of calls that etcd did not answer.
func TestAddedLatency(t *testing.T) {
	const sampleEvery = 16
	bothWays(t, func(t *testing.T, startProxy starter) {
		const slow = 200 * time.Millisecond // etcd's answer to the key "slow"
		etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
			RangeFn: func(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
				if string(r.Key) == "slow" {
					time.Sleep(slow)
				}
				return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: r.Key, Value: proxytest.Sealed(string(r.Key), "v")}}}, nil
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

// TestCertificateExpiry: the metric shows the files in use, and follows them.
func TestCertificateExpiry(t *testing.T) {
	ca, clients := proxytest.NewAuthority(t, "ca"), proxytest.NewAuthority(t, "clients")
	cert, key, leaf := ca.IssueFor(20*time.Minute, "server", "server")
	mine, mineKey, forEtcd := clients.IssueFor(30*time.Minute, "proxy", "")
	r := prometheus.NewRegistry()
	at := func(address string) listener.Config {
		return listener.Config{Address: address, TLS: &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: clients.File}}
	}
	p, err := New(Config{
		// Two with one address must not spoil the metrics.
		Listeners:  []listener.Config{at("127.0.0.1:0"), at("127.0.0.1:0"), {Address: "localhost:0"}},
		Upstream:   upstream.Config{Endpoints: []string{"https://127.0.0.1:1"}, TLS: &upstream.TLS{CAFile: ca.File, CertFile: mine, KeyFile: mineKey}},
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
		{"listener", "127.0.0.1:0"}: leaf, {"listener_client_ca", "127.0.0.1:0"}: clients.Cert, {"etcd_client", ""}: forEtcd, {"etcd_ca", ""}: ca.Cert,
	}
	expect("at first", want)

	_, _, want[[2]string{"listener", "127.0.0.1:0"}] = ca.IssueFor(40*time.Minute, "server", "server")
	_, _, want[[2]string{"etcd_client", ""}] = clients.IssueFor(50*time.Minute, "proxy", "")
	expect("after they were renewed", want)

	proxytest.Replace(t, cert, []byte("not a certificate"))
	expect("while a file is damaged", want)

	// A chain ends with the first of its certificates that does; a CA file with the last.
	_, _, long := ca.IssueFor(2*time.Hour, "server", "server")
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: long.Raw}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw})...)
	proxytest.Replace(t, cert, chain)
	_, _, later := clients.IssueFor(3*time.Hour, "later", "later")
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: clients.Cert.Raw}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: later.Raw})...)
	proxytest.Replace(t, clients.File, both)
	want[[2]string{"listener", "127.0.0.1:0"}] = ca.Cert
	want[[2]string{"listener_client_ca", "127.0.0.1:0"}] = later
	expect("with a chain and two CAs", want)
}

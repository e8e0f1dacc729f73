package upgrade

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestRestart restarts each of two proxies several times while clients that have the addresses of
// both put, get, watch and write in transactions. No request may fail, and every watch must get
// each event once.
func TestRestart(t *testing.T) {
	restarts := 8
	if testing.Short() {
		restarts = 4
	}
	e := harness.New(t)
	etcd := e.StartEtcd(harness.EtcdConfig{})
	kms := e.LocalKey("dev", 1)
	var proxies []*harness.Proxy
	for _, name := range []string{"proxy-1", "proxy-2"} {
		p := e.NewProxy(name, site(etcd, kms))
		p.Start()
		p.WaitReady(within)
		proxies = append(proxies, p)
	}
	l := newLoad(t, e, proxies)
	l.during(client(t, etcd.URL), func() {
		for i := range restarts {
			p := proxies[i%2]
			for _, other := range proxies {
				l.connected(other)
			}
			l.proceed(1000)
			// Every second time, etcd does not answer for a while: requests of all workers are
			// in flight when the drain begins, and must be finished during it.
			finish := func() {}
			if i/2%2 == 1 {
				finish = l.hold(etcd)
			}
			begun := time.Now()
			if !p.Stop(within) {
				t.Error("the proxy does not end")
			}
			finish()
			t.Logf("stopped within %v", time.Since(begun).Round(time.Millisecond))
			l.proceed(200)
			p.Start()
			p.WaitReady(within)
		}
	})
}

// hold stops etcd until every worker waits for it, and for a moment longer. The function that it
// returns waits until etcd continues.
func (l *load) hold(etcd *harness.Etcd) (finish func()) {
	l.t.Helper()
	if err := syscall.Kill(etcd.PID(), syscall.SIGSTOP); err != nil {
		l.t.Fatal(err)
	}
	before := int64(-1)
	harness.Eventually(l.t, within, "every worker to wait", func() error {
		now := l.requests.Load()
		same := now == before
		before = now
		if !same {
			return errors.New("there are still answers")
		}
		return nil
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		time.Sleep(300 * time.Millisecond) // of the drain
		_ = syscall.Kill(etcd.PID(), syscall.SIGCONT)
	}()
	return func() { <-done }
}

// site is the configuration of a proxy with few log records.
func site(etcd *harness.Etcd, kms harness.KMSConfig) harness.ProxyConfig {
	return harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{etcd.URL}}, KMS: []harness.KMSConfig{kms},
		Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}}, Log: harness.LogConfig{Level: "info"},
	}
}

// during runs restart while the clients send requests, and checks their results.
func (l *load) during(etcd *clientv3.Client, restart func()) {
	l.t.Helper()
	watching, stopWatches := context.WithCancel(l.t.Context())
	defer stopWatches()
	watched := l.watch(watching)
	working, stopWork := context.WithCancel(l.t.Context())
	defer stopWork()
	done := make(chan struct{})
	l.started = time.Now()
	go func() { defer close(done); l.run(working) }()
	restart()
	l.proceed(500)
	stopWork()
	<-done
	l.check(l.t.Context(), etcd, func() { stopWatches(); watched() })
}

package kubernetes

import (
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestAPIServer checks that an unmodified kube-apiserver can do everything that it can do with bare
// etcd, however it is connected to the proxy.
func TestAPIServer(t *testing.T) {
	t.Parallel()
	for _, s := range []shape{
		{name: "plain TCP", transport: "tcp"},
		{name: "TLS on both legs, without RangeStream", transport: "tls", unstreamed: true},
		{name: "only Secrets", transport: "tcp", onlySecret: true},
		{name: "only Secrets, by TLS on a unix socket", transport: "unix+tls", onlySecret: true},
		{name: "unix socket", transport: "unix"},
		{name: "TLS on both legs", transport: "tls"},
		{name: "plain TCP, without RangeStream", transport: "tcp", unstreamed: true},
		{name: "unix socket, without RangeStream", transport: "unix", unstreamed: true},
	} {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			if testing.Short() && (s.name != "TLS on both legs, without RangeStream" && s.name != "only Secrets") {
				t.Skip("the short run takes one way with everything through the proxy and one with only Secrets; the others differ in flags alone")
			}
			k := newStack(t, s)
			k.proxy.WaitReady(60 * time.Second)
			k.proxy.RecordTested("kube-apiserver")
			k.start()
			k.surface(t)
			if t.Failed() {
				return
			}
			// Keep some objects to look at.
			left, err := k.client("default").Create(t.Context(), k.secret("left", "left"), metav1.CreateOptions{})
			k.wants(t, left, err, "left")
			k.checkStored(t)
			streamed := k.calls(t, "RangeStream")
			if s.unstreamed && streamed != 0 || !s.unstreamed && streamed == 0 {
				t.Errorf("etcd was asked for %d range streams", streamed)
			}
		})
	}
}

package differential

import (
	"context"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestEtcdOutage checks that the proxy starts before etcd, reports it, and serves as soon as etcd
// does, and that it survives a restart of etcd.
func TestEtcdOutage(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	address := harness.FreeAddress(t)
	p := env.StartProxy("proxy", harness.ProxyConfig{
		Coordination: harness.NoCoordination(),
		Etcd:         harness.Upstream{Endpoints: []string{"http://" + address}}, KMS: []harness.KMSConfig{env.LocalKey(provider, 1)}, Rules: ruleSets[0].rules,
	})
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	put := func(within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("k"), Value: []byte(env.Sealed.Value("v"))})
		return err
	}
	refused := func() {
		t.Helper()
		// The error may depend on the client's deadline, but the write must never be reported as
		// done.
		if code := status.Code(put(time.Second)); code != codes.Unavailable && code != codes.DeadlineExceeded {
			t.Errorf("a put without etcd: %v, want Unavailable or DeadlineExceeded", code)
		}
		harness.Eventually(t, 10*time.Second, "/readyz to say that etcd is away", func() error {
			if p.Ready() == nil {
				return fmt.Errorf("it says that all is well")
			}
			return p.Alive()
		})
	}
	back := func() {
		t.Helper()
		start := time.Now()
		harness.Eventually(t, 10*time.Second, "a put", func() error { return put(5 * time.Second) })
		// Reconnecting takes tenths of a second, and not the minutes of gRPC's default backoff.
		if took := time.Since(start); took > 4*time.Second {
			t.Errorf("the first put after etcd's start took %v", took)
		}
		p.WaitReady(10 * time.Second)
	}
	refused()
	etcd := env.StartEtcd(harness.EtcdConfig{Address: address})
	back()
	etcd.Kill()
	refused()
	etcd.Start()
	back()
}

package interop

import (
	"context"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func newClient(tb testing.TB, p *plugin, provider string) kmsclient.Service {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	tb.Cleanup(cancel)
	client, err := kmsv2.NewGRPCService(ctx, p.endpoint, provider, 10*time.Second)
	if err != nil {
		tb.Fatal(err)
	}
	return client
}

package interop

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// client is the way to the plugin that kube-apiserver has too, with errors classified as crypto/keyring wants them.
type client struct{ service.Service }

var _ kmsclient.Service = client{}

func newClient(tb testing.TB, p *plugin, provider string) kmsclient.Service {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	tb.Cleanup(cancel)
	c, err := kmsv2.NewGRPCService(ctx, p.endpoint, provider, 10*time.Second)
	if err != nil {
		tb.Fatal(err)
	}
	return client{c}
}

// Decrypt implements kmsclient.Service.
func (c client) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	plain, err := c.Service.Decrypt(ctx, uid, req)
	switch status.Code(err) {
	case codes.OK:
		return plain, nil
	case codes.InvalidArgument:
		return nil, &kmsclient.Error{Op: "Decrypt", Class: kmsclient.ClassInvalid, KeyID: req.KeyID}
	case codes.NotFound:
		return nil, &kmsclient.Error{Op: "Decrypt", Class: kmsclient.ClassKeyUnusable, KeyID: req.KeyID}
	}
	return nil, err
}

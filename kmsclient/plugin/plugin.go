// Package plugin calls any Kubernetes KMS v2 plugin on a unix socket, as kube-apiserver does.
package plugin

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// Config says where the plugin listens.
type Config struct {
	Endpoint string // unix:///path, or unix:///@name for an abstract socket
}

// KMS is a client of one plugin. It is safe for concurrent use. It connects at the first call and
// again whenever the plugin returns.
type KMS struct {
	address string // of the socket, as the net package has it
	dialed  atomic.Pointer[dialResult]
	conn    *grpc.ClientConn
	api     kmsapi.KeyManagementServiceClient
}

var _ kmsclient.Service = (*KMS)(nil)

// New makes a client. It does not connect: the plugin may come later.
func New(cfg Config) (*KMS, error) {
	path, ok := strings.CutPrefix(cfg.Endpoint, "unix://")
	if !ok || !strings.HasPrefix(path, "/") || path == "/" || path == "/@" {
		return nil, fmt.Errorf("plugin endpoint %q: must be unix:///path/to/socket", cfg.Endpoint)
	}
	k := &KMS{address: path}
	target := "unix://" + path
	if name, abstract := strings.CutPrefix(path, "/@"); abstract {
		target, k.address = "unix-abstract:"+name, "@"+name
	}
	var err error
	k.conn, err = grpc.NewClient(target, grpc.WithContextDialer(k.dial), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), // a socket of this machine, whatever HTTPS_PROXY says
		// A plugin may restart while the proxy runs: retry after short delays.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}), grpc.WithDisableRetry(), grpc.WithAuthority("localhost"))
	if err != nil {
		return nil, fmt.Errorf("plugin endpoint %q: %w", cfg.Endpoint, err)
	}
	k.api = kmsapi.NewKeyManagementServiceClient(k.conn)
	return k, nil
}

// Close ends the connection and every call on it.
func (k *KMS) Close() error { return k.conn.Close() }

// Encrypt implements [kmsclient.Service].
func (k *KMS) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	res, err := k.api.Encrypt(ctx, &kmsapi.EncryptRequest{Uid: uid, Plaintext: data})
	if err != nil {
		return nil, k.safe(ctx, "Encrypt", "", err)
	}
	return &service.EncryptResponse{Ciphertext: res.Ciphertext, KeyID: res.KeyId, Annotations: res.Annotations}, nil
}

// Decrypt implements [kmsclient.Service].
func (k *KMS) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	res, err := k.api.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: uid, Ciphertext: req.Ciphertext, KeyId: req.KeyID, Annotations: req.Annotations})
	if err != nil {
		return nil, k.safe(ctx, "Decrypt", req.KeyID, err)
	}
	return res.Plaintext, nil
}

// Status implements [kmsclient.Service].
func (k *KMS) Status(ctx context.Context) (*service.StatusResponse, error) {
	res, err := k.api.Status(ctx, &kmsapi.StatusRequest{})
	if err != nil {
		return nil, k.safe(ctx, "Status", "", err)
	}
	return &service.StatusResponse{Version: res.Version, Healthz: res.Healthz, KeyID: res.KeyId}, nil
}

// safe keeps a failed call's code and discards the plugin's text, which may contain the request.
func (k *KMS) safe(ctx context.Context, op, keyID string, err error) error {
	code := status.Code(err)
	e := &kmsclient.Error{Op: op, Reason: reasonOf(code), Code: code.String(), KeyID: keyID, Detail: k.detail(ctx, code)}
	cause := ctx.Err()
	if _, limited := ctx.Deadline(); limited && cause == nil && code == codes.DeadlineExceeded {
		// the plugin gets the deadline and may respond just before it
		cause = context.DeadlineExceeded
	}
	return kmsclient.WithCause(e, cause)
}

// detail says what the operator should check.
func (k *KMS) detail(ctx context.Context, c codes.Code) string {
	switch c {
	case codes.Unavailable:
		return k.unavailable()
	case codes.DeadlineExceeded:
		return "the plugin did not answer in time: " + ownLog
	case codes.Unimplemented:
		return k.unimplemented(ctx)
	}
	return ownLog
}

// reasonOf follows gRPC's meaning of the codes. Plugins made with k8s.io/kms answer Internal or
// Unknown for every fault, lasting or not.
func reasonOf(c codes.Code) kmsclient.Reason {
	switch c {
	case codes.PermissionDenied, codes.Unauthenticated:
		return kmsclient.Denied
	case codes.FailedPrecondition:
		return kmsclient.KeyDisabled
	case codes.NotFound:
		return kmsclient.KeyGone
	case codes.InvalidArgument, codes.DataLoss, codes.OutOfRange:
		return kmsclient.Invalid
	case codes.Unimplemented:
		return kmsclient.BrokenContract
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Canceled:
		return kmsclient.Unreachable // silence, or too much load
	}
	return kmsclient.Failing
}

package pluginserver

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestServerCodes gives each class its code, and keeps foreign texts out.
func TestServerCodes(t *testing.T) {
	for name, tc := range map[string]struct {
		failure kmstest.Failure
		want    codes.Code
	}{
		"unavailable": {kmstest.Failure{}, codes.Unavailable},
		"answered":    {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.Failing}}, codes.Unknown},
		"foreign":     {kmstest.Failure{Err: fmt.Errorf("cannot wrap %s", canary)}, codes.Unavailable},
		"denied":      {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.Denied, Code: "Forbidden"}}, codes.PermissionDenied},
		"key":         {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.KeyDisabled}}, codes.FailedPrecondition},
		"gone":        {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.KeyGone}}, codes.NotFound},
		"invalid":     {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.Invalid}}, codes.InvalidArgument},
		"contract":    {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.BrokenContract}}, codes.Internal},
		"panic":       {kmstest.Failure{Panic: canary}, codes.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			f := kmstest.NewFault(kmstest.NewMemory())
			f.SetFault(func(string, int) *kmstest.Failure { return &tc.failure })
			var log strings.Builder
			counted := map[string]codes.Code{}
			server := newServer(t, f.Service(), func(c *Config) {
				c.Logger = newLogger(&log)
				c.Observer = func(op string, code codes.Code) { counted[op] = code }
			})
			r := serve(t, server)
			for op, err := range callRaw(t, r.endpoint) {
				s := status.Convert(err)
				if s.Code() != tc.want || !strings.HasPrefix(s.Message(), "etcd-kms-proxy: kms "+op+": ") || !strings.Contains(s.Message(), "acme") ||
					strings.Contains(s.Message(), "anary") {
					t.Errorf("%s: %v; want %v", op, err, tc.want)
				}
			}
			r.cancel()
			if err := <-r.ended; err != nil {
				t.Fatal(err)
			}
			if len(counted) != 3 || counted["Encrypt"] != tc.want || counted["Status"] != tc.want {
				t.Errorf("counted %v", counted)
			}
			if !strings.Contains(log.String(), "KMS health check failed") || !strings.Contains(log.String(), "call failed") || strings.Contains(log.String(), "anary") {
				t.Errorf("log:\n%s", &log)
			}
		})
	}
}

// callRaw makes one call of each operation and returns the gRPC errors.
func callRaw(t *testing.T, endpoint string) map[string]error {
	t.Helper()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	api := kmsapi.NewKeyManagementServiceClient(conn)
	errs := map[string]error{}
	_, errs["Encrypt"] = api.Encrypt(t.Context(), &kmsapi.EncryptRequest{Uid: "u", Plaintext: []byte(canary)})
	_, errs["Decrypt"] = api.Decrypt(t.Context(), &kmsapi.DecryptRequest{Uid: "u", Ciphertext: []byte(canary), KeyId: "k"})
	_, errs["Status"] = api.Status(t.Context(), &kmsapi.StatusRequest{})
	return errs
}

package pluginserver

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestRefusal: a key that may not be used is an error at once, so that API servers stop writing
// under it.
func TestRefusal(t *testing.T) {
	for reason, want := range map[kmsclient.Reason]codes.Code{
		kmsclient.Denied: codes.PermissionDenied, kmsclient.KeyDisabled: codes.FailedPrecondition,
	} {
		t.Run(reason.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := kmstest.NewFault(kmstest.NewMemory())
				s := newServer(t, f.Service(), nil)
				polls(t, s)
				says(t, s, "memory/1")
				f.SetFault(func(string, int) *kmstest.Failure { return &kmstest.Failure{Err: &kmsclient.Error{Reason: reason}} })
				if _, err := s.Encrypt(t.Context(), &kmsapi.EncryptRequest{Plaintext: []byte(canary)}); status.Code(err) != want {
					t.Errorf("Encrypt: %v", err)
				}
				time.Sleep(2 * time.Second) // what Encrypt met is looked at soon
				if _, err := s.Status(t.Context(), nil); status.Code(err) != want {
					t.Errorf("Status: %v", err)
				}
				calls := f.Calls("Status")
				for range 5 {
					_, _ = s.Encrypt(t.Context(), &kmsapi.EncryptRequest{Plaintext: []byte(canary)})
				}
				time.Sleep(8 * time.Second)
				if n := f.Calls("Status") - calls; n != 0 {
					t.Errorf("%d contacts more than every 10 s while it is known", n)
				}
				f.SetFault(nil)
				encrypts(t, s)
				time.Sleep(2 * time.Second) // and so is that it works again
				says(t, s, "memory/1")
			})
		})
	}
}

// TestBeginsDown starts without a KMS: calls of Status wait for the first contact to fail, and soon
// after the KMS is there all is well.
func TestBeginsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := kmstest.NewFault(kmstest.NewMemory())
		release := make(chan struct{})
		f.SetFault(func(string, int) *kmstest.Failure {
			<-release
			return &kmstest.Failure{}
		})
		s := newServer(t, f.Service(), nil)
		polls(t, s)
		ended := make(chan error, 1)
		go func() {
			_, err := s.Status(t.Context(), nil)
			ended <- err
		}()
		synctest.Wait()
		select {
		case err := <-ended:
			t.Fatalf("Status did not wait: %v", err)
		default:
		}
		if st := s.State(); st.Healthy || st.Reason == "" || st.KeyID != "" {
			t.Errorf("%+v", st)
		}
		close(release)
		if err := <-ended; status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
		f.SetFault(nil)
		time.Sleep(10 * time.Second)
		says(t, s, "memory/1")
	})
}

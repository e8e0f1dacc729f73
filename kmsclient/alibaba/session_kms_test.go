package alibaba

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// sessions returns a backend's source of sessions, and makes its clock go wrong by what the
// returned function is given.
func sessions(t *testing.T, b *Backend) (s *sessionSource, advance func(time.Duration)) {
	t.Helper()
	s, ok := b.creds.(*sessionSource)
	if !ok {
		t.Fatal("the backend has no sessions")
	}
	var offset atomic.Int64
	s.now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	return s, func(d time.Duration) { offset.Add(int64(d)) }
}

// settle waits for the fetch under way, if there is one.
func (s *sessionSource) settle() {
	s.mu.Lock()
	flight := s.flight
	s.mu.Unlock()
	if flight != nil {
		<-flight
	}
}

// TestServiceDownWhileSessionLives: calls go on with the last good session until it ends, then say
// why they cannot, and go on by themselves once the service is back.
func TestServiceDownWhileSessionLives(t *testing.T) {
	for _, kind := range []string{AssumeRole, OIDC} {
		t.Run(kind, func(t *testing.T) {
			w := newRoleWorld(t, kind, func(c *kmsdouble.STSConfig, _ *Config) { c.Lifetime = 20 * time.Minute })
			s, advance := sessions(t, w.backend)
			mustDataKey(t, w.backend)
			first := w.sts.LastSession()
			w.sts.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &kmsdouble.FaultSpec{Kind: kmsdouble.ServerError} })
			advance(16 * time.Minute)
			for range 5 {
				mustDataKey(t, w.backend)
			}
			s.settle()
			if n := w.sts.Calls(action(kind)); n != 2 {
				t.Errorf("%d calls of the service, want one that fails", n)
			}
			advance(5 * time.Minute)
			for range 5 {
				_, err := w.backend.GenerateDataKey(t.Context(), "")
				if e := asError(t, err); e.Class() != kmsclient.ClassUnavailable || e.HTTPStatus != 503 {
					t.Errorf("after the session's end: %v", err)
				}
			}
			if n := w.sts.Calls(action(kind)); n != 3 {
				t.Errorf("%d calls of the service", n)
			}
			w.sts.ClearFaults()
			w.sts.SetLifetime(time.Hour)
			advance(maxRetry)
			mustDataKey(t, w.backend)
			if w.sts.LastSession() == first {
				t.Error("no new session")
			}
		})
	}
}

// TestTokenFileRotates as the kubelet does it: the next session is fetched with the token of then.
func TestTokenFileRotates(t *testing.T) {
	w := newRoleWorld(t, OIDC, nil)
	s, advance := sessions(t, w.backend)
	mustDataKey(t, w.backend)
	w.sts.SetOIDCToken(canaryOIDC, time.Unix(1, 0))
	w.sts.SetOIDCToken(canaryOIDC+"2", time.Now().Add(time.Hour))
	advance(51 * time.Minute)
	mustDataKey(t, w.backend) // begins a fetch with the old token
	s.settle()
	replaceFile(t, w.tokenFile, canaryOIDC+"2")
	mustDataKey(t, w.backend) // begins another at once
	s.settle()
	records := w.sts.Records()
	if len(records) != 3 || records[1].Code != "AuthenticationFail.OIDCToken.Expired" || records[2].Code != "" {
		t.Errorf("%+v", records)
	}
}

// TestRejectedSession: when the KMS no longer takes a session, the call that found out goes on with
// a new one. When there is none, the KMS' own refusal counts, and the service is not asked for each
// call.
func TestRejectedSession(t *testing.T) {
	w := newRoleWorld(t, AssumeRole, nil)
	mustDataKey(t, w.backend)
	ended := w.sts.LastSession()
	ended.Expires = time.Now().Add(-time.Minute)
	w.kms.SetAccessKey(ended)
	mustDataKey(t, w.backend)
	if n := w.sts.Calls("AssumeRole"); n != 2 {
		t.Errorf("%d calls of the service", n)
	}

	s, advance := sessions(t, w.backend)
	advance(renewPause)
	w.sts.RemoveRole(kmsdouble.DefaultRoleARN)
	w.kms.RemoveAccessKey(w.sts.LastSession().ID)
	for range 10 {
		_, err := w.backend.GenerateDataKey(t.Context(), "")
		if e := asError(t, err); e.Class() != kmsclient.ClassDenied || e.Code != "InvalidAccessKeyId.NotFound" {
			t.Errorf("a revoked role: %v", err)
		}
	}
	if n := w.sts.Calls("AssumeRole"); n != 3 {
		t.Errorf("%d calls of the service", n)
	}
	w.sts.SetRole(kmsdouble.Role{ARN: kmsdouble.DefaultRoleARN})
	advance(maxRetry)
	mustDataKey(t, w.backend)
	s.settle()
}

// TestManyCallersWhileSessionsChange is for the race detector: sessions end every few seconds, are
// revoked before, the key rotates, and STS fails every third time; no call of 64 goroutines may
// notice.
func TestManyCallersWhileSessionsChange(t *testing.T) {
	for _, kind := range []string{AssumeRole, OIDC} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			d := kmsdouble.New(t, kmsdouble.Config{AccessKeys: []kmsdouble.AccessKey{}})
			// the next is fetched after the half of it, which leaves time for a throttled fetch on
			// a slow machine, and is over before the end
			sts := kmsdouble.NewSTS(t, kmsdouble.STSConfig{Register: d.SetAccessKey, Lifetime: 16 * time.Second})
			sts.SetOIDCToken(canaryOIDC, time.Now().Add(time.Hour))
			b, err := New(Config{
				Region: d.Region(), KeyID: kmsdouble.DefaultKeyID, Endpoint: d.Endpoint(), CAFile: d.CAFile(),
				Credentials: Credentials{
					Type: kind, RoleARN: kmsdouble.DefaultRoleARN, STSEndpoint: sts.Endpoint(), STSCAFile: sts.CAFile(),
					AccessKeyIDFile: forType(t, kind, AssumeRole, kmsdouble.DefaultAccessKeyID), AccessKeySecretFile: forType(t, kind, AssumeRole, kmsdouble.DefaultAccessKeySecret),
					OIDCTokenFile: forType(t, kind, OIDC, canaryOIDC), OIDCProviderARN: kmsdouble.DefaultProviderARN,
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = b.Close() }()
			var asked atomic.Int64
			sts.SetFault(func(*http.Request) *kmsdouble.FaultSpec {
				if asked.Add(1)%3 == 2 {
					return &kmsdouble.FaultSpec{Kind: kmsdouble.Throttle}
				}
				return nil
			})
			ctx, cancel := context.WithTimeout(t.Context(), 13*time.Second)
			defer cancel()
			key := mustDataKey(t, b)
			var wg sync.WaitGroup
			wg.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					select {
					case <-ctx.Done():
					case <-time.After(500 * time.Millisecond):
						d.Rotate(kmsdouble.DefaultKeyID)
					}
				}
			})
			for range 64 {
				wg.Go(func() {
					for ctx.Err() == nil {
						data, err := b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID})
						if err != nil || string(data) != string(key.Plaintext) {
							t.Errorf("decrypt: %v", err)
							return
						}
						_ = b.CredentialsExpire()
						time.Sleep(10 * time.Millisecond)
					}
				})
			}
			wg.Wait()
			if n := sts.Calls(action(kind)); n < 3 || n > 20 {
				t.Errorf("%d calls of STS", n)
			}
		})
	}
}

func forType(t *testing.T, kind, want, text string) string {
	t.Helper()
	if kind != want {
		return ""
	}
	return writeFile(t, "value", text)
}

// TestObserverSeesRequestIDs: whatever the KMS answers, its audit log can be joined with ours.
func TestObserverSeesRequestIDs(t *testing.T) {
	for _, dedicated := range []bool{false, true} {
		d := kmsdouble.New(t, kmsdouble.Config{Dedicated: dedicated})
		var seen []kmsclient.Call
		c, err := kmsclient.New(kmsclient.Config{Name: "k", Backend: newBackend(t, d, nil), Observer: func(c kmsclient.Call) { seen = append(seen, c) }})
		if err != nil {
			t.Fatal(err)
		}
		key, err := c.GenerateDataKey(t.Context(), "u")
		if err != nil {
			t.Fatal(err)
		}
		_, errStatus := c.Status(t.Context())
		_, errEncrypt := c.Encrypt(t.Context(), "u", []byte("x"))
		_, errDecrypt := c.Decrypt(t.Context(), "u", &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID})
		d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
		_, errDisabled := c.Encrypt(t.Context(), "u", []byte("x"))
		if err := errors.Join(errStatus, errEncrypt, errDecrypt); err != nil || errDisabled == nil {
			t.Fatal(err, errDisabled)
		}
		var want []string
		for _, r := range d.Records() {
			// there, Status makes a second request, which counts
			if r.Action != "DescribeKey" || !dedicated {
				want = append(want, r.RequestID)
			}
		}
		for i, call := range seen {
			if len(seen) != len(want) || call.RequestID != want[i] || call.RequestID == "" {
				t.Fatalf("dedicated=%t: observed %v, want %v", dedicated, fmt.Sprint(seen), want)
			}
		}
	}
}

package pluginserver

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

func newLogger(w io.Writer) *slog.Logger { return slog.New(slog.NewJSONHandler(w, nil)) }

// polls runs a server's health checks, without a socket, in a bubble, until the test ends.
func polls(t *testing.T, s *Server) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.key.checks.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
}

func says(t *testing.T, s *Server, keyID string) {
	t.Helper()
	res, err := s.Status(t.Context(), nil)
	if err != nil || res.KeyId != keyID || res.Healthz != "ok" || res.Version != "v2" {
		t.Errorf("status %v, %v; want the key ID %q", res, err, keyID)
	}
	if st := s.State(); st.KeyID != keyID || !st.Healthy || st.Reason != "" || st.Provider != "acme" {
		t.Errorf("state %+v; want the key ID %q", st, keyID)
	}
}

func encrypts(t *testing.T, s *Server) string {
	t.Helper()
	res, err := s.Encrypt(t.Context(), &kmsapi.EncryptRequest{Uid: "u", Plaintext: []byte(canary)})
	if err != nil {
		t.Fatal(err)
	}
	return res.KeyId
}

// TestRotation: Status names the new key version after a poll at the latest, and at once when
// something was wrapped by it.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := kmstest.NewMemory()
		f := kmstest.NewFault(m)
		s := newServer(t, f.Service(), nil)
		polls(t, s)
		says(t, s, "memory/1")
		m.Rotate()
		says(t, s, "memory/1") // not asked yet
		time.Sleep(time.Minute)
		says(t, s, "memory/2")

		m.Rotate()
		if id := encrypts(t, s); id != "memory/3" {
			t.Fatalf("wrapped under %q", id)
		}
		says(t, s, "memory/3")
		time.Sleep(10 * time.Minute)
		says(t, s, "memory/3")
		if n := f.Calls("Encrypt"); n != 1 {
			t.Errorf("%d calls of Encrypt; want the test's own", n)
		}
		if n := f.Calls("Status"); n < 10 || n > 13 {
			t.Errorf("%d calls of Status in 11 minutes", n)
		}
	})
}

// TestLocalRotation adds a version to the key file.
func TestLocalRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir() + "/key.yaml"
		if err := local.NewKeyFile(path); err != nil {
			t.Fatal(err)
		}
		backend, err := local.New(local.Config{KeyFile: path})
		if err != nil {
			t.Fatal(err)
		}
		s := newServer(t, backend, func(c *Config) { c.PollInterval = 5 * time.Second })
		polls(t, s)
		says(t, s, "1")
		if err := local.AddVersion(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		says(t, s, "2")
		if id := encrypts(t, s); id != "2" {
			t.Errorf("wrapped under %q", id)
		}
	})
}

// disagreeing is a KMS whose Status and Encrypt name what the test sets.
type disagreeing struct {
	*kmstest.Memory
	status, encrypt atomic.Pointer[string]
	encrypts        atomic.Int64
	during          func() // called within Encrypt; may be nil
}

func newDisagreeing(statusID, encryptID string) *disagreeing {
	d := &disagreeing{Memory: kmstest.NewMemory()}
	d.status.Store(&statusID)
	d.encrypt.Store(&encryptID)
	return d
}

func (d *disagreeing) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: *d.status.Load()}, nil
}

func (d *disagreeing) Encrypt(context.Context, string, []byte) (*service.EncryptResponse, error) {
	d.encrypts.Add(1)
	id := *d.encrypt.Load()
	if d.during != nil {
		d.during()
	}
	return &service.EncryptResponse{Ciphertext: []byte("wrapped"), KeyID: id}, nil
}

func set(p *atomic.Pointer[string], id string) { p.Store(&id) }

// TestEncryptCounts: what Encrypt answers is what Status names, although the KMS' Status goes on
// saying something else; whether it still does is checked less and less often.
func TestEncryptCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisagreeing("old", "new")
		s := newServer(t, d, nil)
		polls(t, s)
		says(t, s, "old")
		if id := encrypts(t, s); id != "new" {
			t.Fatal(id)
		}
		says(t, s, "new")
		time.Sleep(24 * time.Hour)
		says(t, s, "new")
		if n := d.encrypts.Load(); n < 20 || n > 40 {
			t.Errorf("%d calls of Encrypt in a day", n)
		}
		// An answer of a node that lagged behind is corrected.
		set(&d.encrypt, "old")
		time.Sleep(2 * time.Hour)
		says(t, s, "old")
		before := d.encrypts.Load()
		time.Sleep(24 * time.Hour)
		if n := d.encrypts.Load() - before; n != 0 {
			t.Errorf("%d calls of Encrypt while all agree", n)
		}
		// And a Status that has news counts again.
		set(&d.status, "third")
		set(&d.encrypt, "third")
		time.Sleep(time.Minute)
		says(t, s, "third")
	})
}

// TestLateAnswers: an Encrypt that began before a poll saw the new key does not bring the old one
// back.
func TestLateAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisagreeing("old", "old")
		s := newServer(t, d, nil)
		polls(t, s)
		says(t, s, "old")
		d.during = func() {
			set(&d.status, "new")
			set(&d.encrypt, "new")
			time.Sleep(2 * time.Second) // a poll comes first, because this one is short
		}
		s.key.checks.Wake()
		time.Sleep(time.Millisecond) // the poke waits for its second
		if id := encrypts(t, s); id != "old" {
			t.Fatal(id)
		}
		says(t, s, "new")
	})
}

// TestOutage: Status says what is wrong and goes on naming the key for a while, then is an error,
// and recovers by itself.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := kmstest.NewFault(kmstest.NewMemory())
		s := newServer(t, f.Service(), nil)
		polls(t, s)
		says(t, s, "memory/1")
		f.SetFault(func(string, int) *kmstest.Failure { return &kmstest.Failure{Err: errors.New(canary)} })
		for range 11 { // up to 55 minutes
			time.Sleep(5 * time.Minute)
			res, err := s.Status(t.Context(), nil)
			if err != nil || res.KeyId != "memory/1" || res.Version != "v2" || !strings.HasPrefix(res.Healthz, "etcd-kms-proxy: kms Status: unavailable") ||
				strings.Contains(res.Healthz, "anary") {
				t.Errorf("%v, %v", res, err)
			}
			if st := s.State(); st.Healthy || st.KeyID != "memory/1" || st.Reason == "" {
				t.Errorf("%+v", st)
			}
		}
		time.Sleep(10 * time.Minute)
		if _, err := s.Status(t.Context(), nil); status.Code(err) != codes.Unavailable || strings.Contains(err.Error(), "anary") {
			t.Errorf("got %v", err)
		}
		f.SetFault(nil)
		time.Sleep(16 * time.Second) // a poll, and one more if the circuit was open
		says(t, s, "memory/1")
	})
}

// TestNothingKept is an outage with SealUnreachableFor zero.
func TestNothingKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := kmstest.NewFault(kmstest.NewMemory())
		s := newServer(t, f.Service(), func(c *Config) { c.SealUnreachableFor = 0 })
		polls(t, s)
		says(t, s, "memory/1")
		f.SetFault(func(string, int) *kmstest.Failure { return &kmstest.Failure{} })
		time.Sleep(2 * time.Minute)
		if _, err := s.Status(t.Context(), nil); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
	})
}

package kmsclient_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestOneAttempt: whatever becomes of it, there is no other.
func TestOneAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, failure := range map[string]kmstest.Failure{
			"silent": {}, "hangs": {Hang: true}, "answered": {Err: &kmsclient.Error{Reason: kmsclient.Failing}}, "denied": {Err: &kmsclient.Error{Reason: kmsclient.Denied}},
		} {
			for _, op := range operationNames {
				c, f, m := newFaulty(t)
				f.SetFault(func(string, int) *kmstest.Failure { return &failure })
				if err := call(kmsclient.OneAttempt(t.Context()), c, m, op); err == nil || f.Calls(op) != 1 {
					t.Errorf("%s, %s: %v after %d calls", op, name, err, f.Calls(op))
				}
			}
		}
	})
}

// TestPastCircuit: a check is made while the circuit is open, and closes it if it succeeds.
func TestPastCircuit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f, _ := newOpen(t)
		refused(t, c, f, "open")
		f.Inject("Status", kmstest.Failure{})
		check := kmsclient.PastCircuit(kmsclient.OneAttempt(t.Context()))
		if _, err := c.Status(check); class(t, err) != kmsclient.ClassUnavailable || kmsclient.NotCalled(err) || f.Calls("Status") != 6 {
			t.Errorf("a check that fails: %v, %d calls", err, f.Calls("Status"))
		}
		refused(t, c, f, "after a check that failed")
		if _, err := c.Status(t.Context()); !kmsclient.NotCalled(err) {
			t.Errorf("open: %v", err)
		}
		if _, err := c.Status(check); err != nil {
			t.Error(err)
		}
		if _, err := c.Status(t.Context()); err != nil || f.Calls("Status") != 8 {
			t.Errorf("after a check that succeeded: %v, %d calls", err, f.Calls("Status"))
		}
	})
}

// TestExpect: a wrong plaintext is an error, is not tried again, and is observed as one.
func TestExpect(t *testing.T) {
	var classes []string
	m := kmstest.NewMemory()
	c := newClient(t, m, func(c kmsclient.Call) { classes = append(classes, c.Op+" "+c.Class) })
	res, err := c.Encrypt(t.Context(), "uid", []byte(canary))
	if err != nil {
		t.Fatal(err)
	}
	req := &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations}
	if got, err := c.Decrypt(kmsclient.Expect(t.Context(), sha256.Sum256([]byte(canary))), "uid", req); err != nil || string(got) != canary {
		t.Errorf("the right one: %v", err)
	}
	got, err := c.Decrypt(kmsclient.Expect(t.Context(), sha256.Sum256(nil)), "uid", req)
	if got != nil || class(t, err) != kmsclient.ClassContract || !errors.Is(err, kmsclient.ErrOtherSecret) {
		t.Errorf("another one: %d bytes, %v", len(got), err)
	}
	short := func(n int) error { return fmt.Errorf("it has %d bytes", n) }
	got, err = c.Decrypt(kmsclient.ExpectLength(t.Context(), short), "uid", req)
	if got != nil || class(t, err) != kmsclient.ClassContract || !strings.Contains(err.Error(), fmt.Sprintf("it has %d bytes", len(canary))) {
		t.Errorf("one of another length: %d bytes, %v", len(got), err)
	}
	if want := []string{"Encrypt ok", "Decrypt ok", "Decrypt contract", "Decrypt contract"}; !slices.Equal(classes, want) {
		t.Errorf("observed %q, want %q", classes, want)
	}
}

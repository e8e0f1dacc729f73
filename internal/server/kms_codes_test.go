package server

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// faultOn is a fault in the answers to some actions.
func faultOn(f kmsdouble.FaultSpec, actions ...string) func(*http.Request) *kmsdouble.FaultSpec {
	return func(r *http.Request) *kmsdouble.FaultSpec {
		for _, a := range actions {
			if r.URL.Query().Get("Action") == a {
				again := f
				return &again
			}
		}
		return nil
	}
}

// TestRefusalOfACallIsNoDamage: a code that does not speak of the ciphertext says nothing of the
// value, so that the rule's policy for damaged values, to hand them on as stored, must not apply.
func TestRefusalOfACallIsNoDamage(t *testing.T) {
	double, d, ctx := kmsdouble.New(t, kmsdouble.Config{}), clitest.NewDir(t), context.Background()
	edits := append(d.OnAlibaba(t, double, clitest.FileCredentials), "writeWith: dev", "writeWith: dev\n  onUndecryptable: passthrough")
	a, rule, stop := rulesOf(t, d, edits...)
	key, value := []byte("/registry/secrets/ns/a"), []byte("v")
	stored, err := rule.Seal(ctx, key, value)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	a.Close()
	fresh := func() func() { // without seeds, and without what was refused before
		a, rule, stop = rulesOf(t, d, edits...)
		clitest.Eventually(t, "first contact", func() bool { return a.keys.Rings()[0].State().CanSeal })
		return func() { stop(); a.Close() }
	}
	for code, status := range map[string]int{
		"UnsupportedOperation": 400, "MissingParameter": 400, "Rejected.LimitExceeded": 400, "InvalidAction.NotFound": 404, "Rejected.InstanceUpgrading": 409, "OperationConflict": 409, "Strange": 418,
	} {
		end := fresh()
		double.SetFault(faultOn(kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: status, Code: code}, "Decrypt"))
		got, err := rule.Open(ctx, nil, key, bytes.Clone(stored))
		if e, ok := errors.AsType[*keyring.Error](err); !ok || e.Kind != keyring.Unavailable && e.Kind != keyring.SeedRefused {
			t.Errorf("%s: %q, %v", code, got, err)
		}
		double.ClearFaults()
		end()
	}
	defer fresh()()
	double.SetFault(faultOn(kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 400, Code: "InvalidParameter"}, "Decrypt"))
	clitest.Eventually(t, "a value that is damaged, as the KMS says", func() bool {
		got, err := rule.Open(ctx, nil, key, bytes.Clone(stored))
		return err == nil && bytes.Equal(got, stored)
	})
	double.ClearFaults()
	clitest.Eventually(t, "the value", func() bool {
		got, err := rule.Open(ctx, nil, key, bytes.Clone(stored))
		return err == nil && bytes.Equal(got, value)
	})
}

// TestPermissionTakenAway: the caller may describe the key, and no more. That ends reads and writes
// as if nothing were allowed.
func TestPermissionTakenAway(t *testing.T) {
	double, d, ctx := kmsdouble.New(t, kmsdouble.Config{}), clitest.NewDir(t), context.Background()
	edits := append(d.OnAlibaba(t, double, clitest.FileCredentials), "admin:", "cache: {revokeWithin: 1s}\nadmin:")
	a, rule, stop := rulesOf(t, d, edits...)
	defer stop()
	key := []byte("/registry/secrets/ns/a")
	stored, err := rule.Seal(ctx, key, []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	double.Permit(kmsdouble.DefaultAccessKeyID, "DescribeKey")
	refused := func(err error) bool {
		e, ok := errors.AsType[*keyring.Error](err)
		return ok && e.Kind == keyring.KeyUnusable
	}
	clitest.Eventually(t, "the end of reads and writes", func() bool {
		_, oerr := rule.Open(ctx, nil, key, bytes.Clone(stored))
		_, serr := rule.Seal(ctx, key, []byte("v"))
		return refused(oerr) && refused(serr)
	})
	if err := rule.Health(); err == nil || !strings.Contains(err.Error(), `Decrypt, code "Forbidden.NoPermission"`) {
		t.Errorf("ready: %v", err)
	}
	double.PermitAll(kmsdouble.DefaultAccessKeyID)
	clitest.Eventually(t, "the value", func() bool {
		got, err := rule.Open(ctx, nil, key, bytes.Clone(stored))
		return err == nil && string(got) == "v" && a.keys.Rings()[0].State().CanSeal
	})
}

// TestMayNotDecrypt: a caller who may make seeds and not unwrap them seals nothing, since nobody
// could read it after a restart.
func TestMayNotDecrypt(t *testing.T) {
	double, d := kmsdouble.New(t, kmsdouble.Config{}), clitest.NewDir(t)
	double.Permit(kmsdouble.DefaultAccessKeyID, "DescribeKey", "GenerateDataKey", "Encrypt")
	_, rule, stop := rulesOf(t, d, d.OnAlibaba(t, double, clitest.FileCredentials)...)
	defer stop()
	_, err := rule.Seal(context.Background(), []byte("k"), []byte("v"))
	if e, ok := errors.AsType[*keyring.Error](err); !ok || e.Kind != keyring.KeyUnusable || !strings.Contains(e.Text, "Decrypt") {
		t.Errorf("sealed: %v", err)
	}
	if rule.Health() == nil {
		t.Error("ready")
	}
}

// TestMaterialExpires as imported material does, while the proxy runs.
func TestMaterialExpires(t *testing.T) {
	double, d, ctx := kmsdouble.New(t, kmsdouble.Config{Keys: []kmsdouble.KeyConfig{{ID: kmsdouble.DefaultKeyID, MaterialExpires: time.Now().Add(time.Hour)}}}), clitest.NewDir(t), context.Background()
	a, rule, stop := rulesOf(t, d, d.OnAlibaba(t, double, clitest.FileCredentials)...)
	defer stop()
	stored, err := rule.Seal(ctx, []byte("k"), []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	double.ImportMaterial(kmsdouble.DefaultKeyID, time.Now())
	clitest.Eventually(t, "revocation", func() bool { return a.keys.Rings()[0].State().Revoked })
	if _, err := rule.Open(ctx, nil, []byte("k"), bytes.Clone(stored)); err == nil || !strings.Contains(err.Error(), "Rejected.PendingImport") {
		t.Errorf("read: %v", err)
	}
	double.ImportMaterial(kmsdouble.DefaultKeyID, time.Now().Add(time.Hour))
	clitest.Eventually(t, "the value", func() bool {
		got, err := rule.Open(ctx, nil, []byte("k"), bytes.Clone(stored))
		return err == nil && string(got) == "v"
	})
}

// TestDescribeKeyIsThrottled: the quota of describing keys is the whole account's. A proxy that
// starts while others have used it up reads, writes, and follows a rotation.
func TestDescribeKeyIsThrottled(t *testing.T) {
	double, d, ctx := kmsdouble.New(t, kmsdouble.Config{}), clitest.NewDir(t), context.Background()
	edits := d.OnAlibaba(t, double, clitest.FileCredentials)
	key, stored := []byte("/registry/secrets/ns/a"), [][]byte(nil)
	current := func(a *Server) func() bool {
		return func() bool { return a.keys.Rings()[0].State().SealedBy == double.PrimaryKeyID(kmsdouble.DefaultKeyID) }
	}
	a, rule, stop := rulesOf(t, d, edits...)
	for range 8 {
		clitest.Eventually(t, "seed of the version", current(a))
		v, err := rule.Seal(ctx, key, []byte("v"))
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, v)
		double.Rotate(kmsdouble.DefaultKeyID)
	}
	stop()
	a.Close()
	double.SetFault(faultOn(kmsdouble.FaultSpec{Kind: kmsdouble.Throttle}, "DescribeKey"))
	a, rule, stop = rulesOf(t, d, edits...)
	defer stop()
	for i, v := range stored {
		if got, err := rule.Open(ctx, nil, key, bytes.Clone(v)); err != nil || string(got) != "v" {
			t.Errorf("value %d: %q, %v", i, got, err)
		}
	}
	if _, err := rule.Seal(ctx, key, []byte("v")); err != nil {
		t.Error(err)
	}
	double.Rotate(kmsdouble.DefaultKeyID)
	clitest.Eventually(t, "seed of the new version", current(a))
}

// TestAliasIsRemoved: it ends writes, and no reads.
func TestAliasIsRemoved(t *testing.T) {
	double, d, ctx := kmsdouble.New(t, kmsdouble.Config{}), clitest.NewDir(t), context.Background()
	edits := d.OnAlibaba(t, double, clitest.FileCredentials)
	edits[1] = strings.Replace(edits[1], kmsdouble.DefaultKeyID, kmsdouble.DefaultAlias, 1)
	a, rule, stop := rulesOf(t, d, edits...)
	defer stop()
	stored, err := rule.Seal(ctx, []byte("k"), []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	double.RemoveAlias(kmsdouble.DefaultAlias)
	clitest.Eventually(t, "the end of writes", func() bool { return !a.keys.Rings()[0].State().CanSeal })
	if got, err := rule.Open(ctx, nil, []byte("k"), bytes.Clone(stored)); err != nil || string(got) != "v" {
		t.Errorf("%q, %v", got, err)
	}
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
	clitest.Eventually(t, "the end of reads", func() bool {
		_, err := rule.Open(ctx, nil, []byte("k"), bytes.Clone(stored))
		e, ok := errors.AsType[*keyring.Error](err)
		return ok && e.Kind == keyring.KeyUnusable
	})
}

// TestKeyIsGoneForGood: the policy for what can never be opened applies once the key is deleted,
// and not while its deletion can be cancelled.
func TestKeyIsGoneForGood(t *testing.T) {
	double, d, ctx := kmsdouble.New(t, kmsdouble.Config{}), clitest.NewDir(t), context.Background()
	edits := d.OnAlibaba(t, double, clitest.FileCredentials)
	edits[1] = strings.Replace(edits[1], kmsdouble.DefaultKeyID, "acs:kms:"+double.Region()+":1234567890:key/"+kmsdouble.DefaultKeyID, 1)
	edits = append(edits, "writeWith: dev", "writeWith: dev\n  onUndecryptable: passthrough")
	a, rule, stop := rulesOf(t, d, edits...)
	defer stop()
	key := []byte("/registry/secrets/ns/a")
	stored, err := rule.Seal(ctx, key, []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.PendingDeletion)
	clitest.Eventually(t, "revocation", func() bool { return a.keys.Rings()[0].State().Revoked })
	if got, err := rule.Open(ctx, nil, key, bytes.Clone(stored)); err == nil {
		t.Errorf("handed on while its key can come back: %q", got)
	}
	double.RemoveKey(kmsdouble.DefaultKeyID)
	clitest.Eventually(t, "stored bytes", func() bool {
		got, err := rule.Open(ctx, nil, key, bytes.Clone(stored))
		return err == nil && bytes.Equal(got, stored)
	})
	if !strings.Contains(metricsOf(t, a), `etcd_kms_proxy_values_decrypted_total{outcome="passthrough"`) {
		t.Error("no metric shows it")
	}
	if _, err := rule.Seal(ctx, key, []byte("v")); err == nil {
		t.Error("sealed under a key that is gone")
	}
}

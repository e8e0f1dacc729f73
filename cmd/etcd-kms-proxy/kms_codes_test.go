package main

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba/kmsdouble"
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

// TestRefusalOfACallIsNoDamage: a code that does not speak of the ciphertext says nothing of the value, so that the rule's policy for damaged values, to hand them on
// as stored, must not apply.
func TestRefusalOfACallIsNoDamage(t *testing.T) {
	double, d, ctx := kmsdouble.New(t, kmsdouble.Config{}), newDir(t), context.Background()
	edits := append(onAlibaba(t, d, double, fileCredentials), "writeWith: dev", "writeWith: dev\n  onUndecryptable: passthrough")
	a, rule, stop := rulesOf(t, d, edits...)
	key, value := []byte("/registry/secrets/ns/a"), []byte("v")
	stored, err := rule.Seal(ctx, key, value)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	a.close()
	a, rule, stop = rulesOf(t, d, edits...) // without seeds
	defer stop()
	eventually(t, "first contact", func() bool { return a.rings[0].State().CanSeal })
	for code, status := range map[string]int{
		"UnsupportedOperation": 400, "MissingParameter": 400, "Rejected.LimitExceeded": 400, "InvalidAction.NotFound": 404, "Rejected.InstanceUpgrading": 409, "OperationConflict": 409, "Strange": 418,
	} {
		double.SetFault(faultOn(kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: status, Code: code}, "Decrypt"))
		got, err := rule.Open(ctx, key, bytes.Clone(stored))
		if e, ok := errors.AsType[*keyring.Error](err); !ok || e.Kind != keyring.Unavailable {
			t.Errorf("%s: %q, %v", code, got, err)
		}
	}
	double.SetFault(faultOn(kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 400, Code: "InvalidParameter"}, "Decrypt"))
	eventually(t, "a value that is damaged, as the KMS says", func() bool {
		got, err := rule.Open(ctx, key, bytes.Clone(stored))
		return err == nil && bytes.Equal(got, stored)
	})
	double.ClearFaults()
	eventually(t, "the value", func() bool {
		got, err := rule.Open(ctx, key, bytes.Clone(stored))
		return err == nil && bytes.Equal(got, value)
	})
}

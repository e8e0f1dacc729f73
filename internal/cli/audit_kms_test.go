package cli

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestAuditedKMS: a call whose record is lost has no result, and while the log cannot be written there is no call.
func TestAuditedKMS(t *testing.T) {
	d := newDir(t)
	a, err := newAuditor(&config.Audit{Path: d.path("audit.jsonl"), Required: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer a.close(slog.New(slog.DiscardHandler))
	calls := 0
	client, err := kmsclient.New(kmsclient.Config{Name: "m", Backend: kmstest.NewMemory(), Observer: func(c kmsclient.Call) { calls++; a.record(kmsRecord(c)) }})
	if err != nil {
		t.Fatal(err)
	}
	k := a.kms("m", client)
	ctx := context.Background()
	key, err := k.(kmsclient.DataKeyGenerator).GenerateDataKey(ctx, "u")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.Encrypt(ctx, "u", []byte("x")); err != nil {
		t.Error(err)
	}
	decrypt := func() error {
		out, err := k.Decrypt(ctx, "u", &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID, Annotations: key.Annotations})
		if (err == nil) != bytes.Equal(out, key.Plaintext) {
			t.Errorf("%d bytes, %v", len(out), err)
		}
		return err
	}
	if err := decrypt(); err != nil {
		t.Error(err)
	}
	unblock := d.block(t)
	for want, made := range []string{"the record of this call is the first that is lost", "no call is made"} {
		before := calls
		err := decrypt()
		if e, ok := errors.AsType[*kmsclient.Error](err); !ok || e.Class() != kmsclient.ClassUnavailable || !strings.Contains(e.Detail, "audit") || e.Provider != "m" {
			t.Errorf("%s: %v", made, err)
		}
		if calls-before != 1-want {
			t.Errorf("%d calls: %s", calls-before, made)
		}
	}
	if res, err := k.Status(ctx); err == nil || res != nil {
		t.Errorf("status: %v, %v", res, err)
	}
	unblock()
	if err := decrypt(); err != nil {
		t.Error(err)
	}
	if r := d.auditLog(t); len(r) < 5 || r[len(r)-2]["lost"] != 1.0 {
		t.Errorf("records: %v", r)
	}
}

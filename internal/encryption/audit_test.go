package encryption

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"k8s.io/kms/pkg/service"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestAuditedKMS: a call whose record is lost has no result, and while the log cannot be written
// there is no call.
func TestAuditedKMS(t *testing.T) {
	d := clitest.NewDir(t)
	a, err := OpenAudit(&config.Audit{Path: d.Path("audit.jsonl"), Required: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	calls := 0
	client, err := kmsclient.New(kmsclient.Config{Name: "m", Backend: kmstest.NewMemory(), Observer: func(c kmsclient.Call) { calls++; a.Record(CallRecord(c)) }})
	if err != nil {
		t.Fatal(err)
	}
	k := AuditedService(a, "m", client)
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
	unblock := d.Block(t)
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
	if r := d.AuditLog(t); len(r) < 5 || r[len(r)-2]["lost"] != 1.0 {
		t.Errorf("records: %v", r)
	}
}

// TestKeyWatchIsAudited: describing a key is a KMS call like any other, and is not made while it
// cannot be recorded.
func TestKeyWatchIsAudited(t *testing.T) {
	d := clitest.NewDir(t)
	c, err := config.Load(d.Config(t, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: "))
	if err != nil {
		t.Fatal(err)
	}
	audit, err := OpenAudit(c.Audit, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer audit.Close()
	registry := prometheus.NewRegistry()
	k, err := New(Config{Config: c, Audit: audit, Registry: registry, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	calls, fail := 0, error(nil)
	describe := k.auditedDescribe("ack", func(ctx context.Context) (*kmsclient.KeyInfo, error) {
		calls++
		kmsclient.NoteRequestID(ctx, "req-1")
		if fail != nil {
			return nil, fail
		}
		return &kmsclient.KeyInfo{KeyID: "key-1/v1"}, nil
	})
	if info, err := describe(t.Context()); err != nil || info.KeyID != "key-1/v1" {
		t.Errorf("%+v, %v", info, err)
	}
	fail = &kmsclient.Error{Reason: kmsclient.Denied, RequestID: "req-2", KeyID: "key-1"}
	if _, err := describe(t.Context()); !errors.Is(err, fail) {
		t.Error(err)
	}
	var got []string
	for _, r := range d.AuditLog(t) {
		got = append(got, fmt.Sprint(r["event"], r["operation"], r["provider"], r["keyID"], r["requestID"], r["class"]))
	}
	if want := []string{"kmsDescribeKeyackkey-1/v1req-1ok", "kmsDescribeKeyackkey-1req-2denied"}; !slices.Equal(got, want) {
		t.Errorf("records %q, want %q", got, want)
	}
	expected := `
# HELP etcd_kms_proxy_kms_operations_total Attempts at the KMS. class is ok or that of the error: unavailable, denied, key_unusable, invalid, contract.
# TYPE etcd_kms_proxy_kms_operations_total counter
etcd_kms_proxy_kms_operations_total{class="denied",operation="DescribeKey",provider="ack"} 1
etcd_kms_proxy_kms_operations_total{class="ok",operation="DescribeKey",provider="ack"} 1
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(expected), "etcd_kms_proxy_kms_operations_total"); err != nil {
		t.Error(err)
	}
	fail = nil
	d.Block(t)
	for range 2 {
		if info, err := describe(t.Context()); !errors.Is(err, auditlog.ErrUnwritable) || info != nil {
			t.Errorf("without the log: %+v, %v", info, err)
		}
	}
	if calls != 3 {
		t.Errorf("%d calls", calls)
	}
	if k.auditedDescribe("local", nil) != nil {
		t.Error("nothing to describe is described")
	}
}

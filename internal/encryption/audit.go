package encryption

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// OpenAudit opens the audit log of c. It returns nil for nil.
func OpenAudit(c *config.Audit, log *slog.Logger) (*auditlog.Log, error) {
	if c == nil {
		return nil, nil
	}
	ac := auditlog.Config{Path: c.Path, MaxSize: int64(c.MaxSizeMiB) << 20, MaxFiles: c.MaxFiles, Required: c.Required, Logger: log}
	if c.KeyFile != "" {
		var err error
		if ac.Key, err = auditlog.LoadKey(c.KeyFile); err != nil {
			return nil, err
		}
	}
	return auditlog.Open(ac)
}

// AuditPath returns the log of another process than the proxy with the log at path, since a log has
// one writer only: audit.what.jsonl for audit.jsonl.
func AuditPath(path, what string) string {
	ext := filepath.Ext(path)
	return strings.TrimSuffix(path, ext) + "." + what + ext
}

// CallRecord is the audit record of one attempt at a KMS.
func CallRecord(c kmsclient.Call) auditlog.Record {
	return auditlog.Record{
		Event: auditlog.EventKMS, Time: c.Time, Provider: c.Provider, Operation: c.Op, KeyID: c.KeyID, RequestID: c.RequestID, Class: c.Class, Latency: c.Duration,
	}
}

// record records an event, for the process and for the command.
func (k *Keys) record(r auditlog.Record) {
	k.Audit.Record(r)
	if k.Record != nil {
		k.Record(r)
	}
}

// observeCall is called for every attempt at a KMS.
func (k *Keys) observeCall(c kmsclient.Call) {
	k.metrics.calls.Observe(c)
	k.record(CallRecord(c))
}

// auditedDescribe has each call of describe counted and recorded as any other KMS call, and made
// only while it can be recorded. It returns nil for nil.
func (k *Keys) auditedDescribe(name string, describe provider.Describe) provider.Describe {
	if describe == nil {
		return nil
	}
	observed := provider.Observed(name, k.observeCall, describe)
	return func(ctx context.Context) (info *kmsclient.KeyInfo, err error) {
		if err = k.Audit.Do(func() error { info, err = observed(ctx); return err }); err != nil {
			return nil, err
		}
		return info, nil
	}
}

// auditedKMS calls a KMS only while the audit log can be written. It is in front of the client with
// its retries and circuit breaker, so that a full disk does not count as a KMS that is down.
type auditedKMS struct {
	kms      *kmsclient.Client
	provider string
	audit    *auditlog.Log
}

var (
	_ kmsclient.Service          = auditedKMS{}
	_ kmsclient.DataKeyGenerator = auditedKMS{}
)

// AuditedService returns c, or c behind a required audit log.
func AuditedService(audit *auditlog.Log, provider string, c *kmsclient.Client) kmsclient.Service {
	if !audit.Required() {
		return c
	}
	return auditedKMS{c, provider, audit}
}

// auditedCall returns the result of f, if it was recorded.
func auditedCall[T any](k auditedKMS, op string, f func() (T, error)) (out T, err error) {
	err = k.audit.Do(func() error { out, err = f(); return err })
	if errors.Is(err, auditlog.ErrUnwritable) {
		err = &kmsclient.Error{Op: op, Provider: k.provider, Reason: kmsclient.Prevented, Detail: auditlog.ErrUnwritable.Error()}
	}
	if err != nil {
		var zero T
		return zero, err
	}
	return out, nil
}

// Encrypt implements [kmsclient.Service].
func (k auditedKMS) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	return auditedCall(k, "Encrypt", func() (*service.EncryptResponse, error) { return k.kms.Encrypt(ctx, uid, data) })
}

// Decrypt implements [kmsclient.Service].
func (k auditedKMS) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	return auditedCall(k, "Decrypt", func() ([]byte, error) { return k.kms.Decrypt(ctx, uid, req) })
}

// Status implements [kmsclient.Service].
func (k auditedKMS) Status(ctx context.Context) (*service.StatusResponse, error) {
	return auditedCall(k, "Status", func() (*service.StatusResponse, error) { return k.kms.Status(ctx) })
}

// GenerateDataKey implements [kmsclient.DataKeyGenerator].
func (k auditedKMS) GenerateDataKey(ctx context.Context, uid string) (*kmsclient.DataKey, error) {
	return auditedCall(k, "GenerateDataKey", func() (*kmsclient.DataKey, error) { return k.kms.GenerateDataKey(ctx, uid) })
}

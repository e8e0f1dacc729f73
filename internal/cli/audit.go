package cli

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// auditor records what happens in the audit log, and holds back what may not happen without it. A nil auditor, that of a configuration without an
// audit block, does neither.
type auditor struct {
	log      *auditlog.Log
	required bool
}

// newAuditor opens the log of c, which may be nil. close must follow.
func newAuditor(c *config.Audit, log *slog.Logger) (*auditor, error) {
	if c == nil {
		return nil, nil
	}
	ac := auditlog.Config{Path: c.Path, MaxSize: int64(c.MaxSizeMiB) << 20, MaxFiles: c.MaxFiles, Logger: log}
	if c.KeyFile != "" {
		var err error
		if ac.Key, err = auditlog.LoadKey(c.KeyFile); err != nil {
			return nil, err
		}
	}
	l, err := auditlog.Open(ac)
	if err != nil {
		return nil, err
	}
	return &auditor{log: l, required: c.Required}, nil
}

// besideAudit is where another process than the proxy with the log at path records what it does: a log has one writer.
func besideAudit(path, what string) string {
	ext := filepath.Ext(path)
	return strings.TrimSuffix(path, ext) + "." + what + ext
}

func (a *auditor) close(log *slog.Logger) {
	if a == nil {
		return
	}
	if err := a.log.Close(); err != nil {
		log.Error("the audit log may not be on the disk as a whole", "error", err)
	}
}

func (a *auditor) record(r auditlog.Record) {
	if a != nil {
		a.log.Record(r)
	}
}

func (a *auditor) started(config [32]byte) {
	a.record(auditlog.Record{Event: auditlog.EventStart, Version: readBuildInfo().Version, Config: hex.EncodeToString(config[:])})
}

// stopped records the end; err is why, if it was no signal.
func (a *auditor) stopped(err error) {
	r := auditlog.Record{Event: auditlog.EventStop, Outcome: "ok"}
	if err != nil {
		r.Outcome, r.Reason = "failed", err.Error()
	}
	a.record(r)
}

func kmsRecord(c kmsclient.Call) auditlog.Record {
	return auditlog.Record{
		Event: auditlog.EventKMS, Time: c.Time, Provider: c.Provider, Operation: c.Op, KeyID: c.KeyID, RequestID: c.RequestID, Class: c.Class, Latency: c.Duration,
	}
}

// kmsCall is told of every attempt at a KMS.
func (a *app) kmsCall(c kmsclient.Call) {
	a.metrics.kmsCall(c)
	a.audit.record(kmsRecord(c))
	a.calls.kmsCall(c)
}

// rescued is told of every seed that came from a recovery copy.
func (a *app) rescued(provider, by, keyID, why string) {
	a.audit.rescued(provider, by, keyID, why)
	a.calls.rescued(provider, by, keyID, why)
}

// rescued records that a seed came from a recovery copy. Each value that it opens is counted by the metric.
func (a *auditor) rescued(provider, by, keyID, why string) {
	a.record(rescueRecord(provider, by, keyID, why))
}

func rescueRecord(provider, by, keyID, why string) auditlog.Record {
	return auditlog.Record{Event: auditlog.EventRecovery, Primary: provider, Provider: by, KeyID: keyID, Reason: why}
}

func (a *auditor) denied(listener, client, remote string) {
	a.record(auditlog.Record{Event: auditlog.EventDenied, Listener: listener, Client: client, Remote: remote})
}

func (a *auditor) reloaded(trigger, outcome, reason string, config [32]byte) {
	a.record(auditlog.Record{Event: auditlog.EventReload, Trigger: trigger, Outcome: outcome, Reason: reason, Config: hex.EncodeToString(config[:])})
}

// register adds the log's own figures to reg.
func (a *auditor) register(reg prometheus.Registerer) {
	if a == nil {
		return
	}
	reg.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_audit_lost_total", Help: "Records of the audit log that could not be written.",
		}, func() float64 { return float64(a.log.Lost()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_audit_writable", Help: "1 if the audit log can be written.",
		}, func() float64 {
			if a.log.Check() != nil {
				return 0
			}
			return 1
		}))
}

// ready is the log's part of the readiness report.
func (a *auditor) ready() []proxy.Check {
	if a == nil {
		return nil
	}
	c := proxy.Check{Name: "audit", OK: true}
	if err := a.log.Check(); err != nil {
		c.OK, c.Detail = false, err.Error()
	}
	return []proxy.Check{c}
}

var errAudit = errors.New("the audit log cannot be written, and audit.required refuses to go on without it")

// refusal is why nothing may be done now that has to be recorded, or nil.
func (a *auditor) refusal() error {
	if a == nil || !a.required || a.log.Check() == nil {
		return nil
	}
	return errAudit
}

// recorded calls f if what it does can be recorded, and returns errAudit if it could not, or if a record was lost meanwhile: what f has found out is then
// not to be used. An error of f itself counts more.
func (a *auditor) recorded(f func() error) error {
	if a == nil || !a.required {
		return f()
	}
	lost := a.log.Lost()
	if err := a.refusal(); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if a.log.Lost() != lost {
		return errAudit
	}
	return nil
}

// auditedSealer seals and opens only while the audit log can be written.
type auditedSealer struct {
	proxy.Sealer
	audit *auditor
}

// sealer puts a required log before s.
func (a *auditor) sealer(s proxy.Sealer) proxy.Sealer {
	if a == nil || !a.required {
		return s
	}
	return auditedSealer{s, a}
}

// Seal implements [proxy.Sealer].
func (s auditedSealer) Seal(ctx context.Context, key, value []byte) (out []byte, err error) {
	err = s.audit.recorded(func() error { out, err = s.Sealer.Seal(ctx, key, value); return err })
	return forClient(out, err)
}

// Open implements [proxy.Sealer].
func (s auditedSealer) Open(ctx context.Context, key, stored []byte) (out []byte, err error) {
	err = s.audit.recorded(func() error { out, err = s.Sealer.Open(ctx, key, stored); return err })
	return forClient(out, err)
}

// TrySeal implements [proxy.Sealer].
func (s auditedSealer) TrySeal(key, value []byte) (out []byte, err error) {
	err = s.audit.recorded(func() error { out, err = s.Sealer.TrySeal(key, value); return err })
	return forClient(out, err)
}

// TryOpen implements [proxy.Sealer].
func (s auditedSealer) TryOpen(key, stored []byte) (out []byte, err error) {
	err = s.audit.recorded(func() error { out, err = s.Sealer.TryOpen(key, stored); return err })
	return forClient(out, err)
}

func forClient(out []byte, err error) ([]byte, error) {
	if errors.Is(err, errAudit) {
		err = &proxy.SealError{Code: codes.Unavailable, Text: errAudit.Error()}
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

// auditedKMS calls a KMS only while the audit log can be written. It stands before the client with its retries and its circuit, so that a full disk does not
// count as a KMS that is down.
type auditedKMS struct {
	kms      *kmsclient.Client
	provider string
	audit    *auditor
}

var (
	_ kmsclient.Service          = auditedKMS{}
	_ kmsclient.DataKeyGenerator = auditedKMS{}
)

// kms puts a required log before c.
func (a *auditor) kms(provider string, c *kmsclient.Client) kmsclient.Service {
	if a == nil || !a.required {
		return c
	}
	return auditedKMS{c, provider, a}
}

// call returns what f does, if it was recorded.
func auditedCall[T any](k auditedKMS, op string, f func() (T, error)) (out T, err error) {
	err = k.audit.recorded(func() error { out, err = f(); return err })
	if errors.Is(err, errAudit) {
		err = &kmsclient.Error{Op: op, Provider: k.provider, Reason: kmsclient.Unreachable, Detail: errAudit.Error()}
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

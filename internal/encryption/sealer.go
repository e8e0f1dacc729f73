package encryption

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// ForProxy returns the rules as the proxy takes them.
func (s *RuleSet) ForProxy() []proxy.Rule {
	rules := make([]proxy.Rule, len(s.sealers))
	for i := range s.sealers {
		rules[i] = proxy.Rule{Prefix: s.config[i].Prefix, Sealer: auditedSealer(s.audit, sealer{s.sealers[i]})}
	}
	return rules
}

// sealer turns the errors of a keyring's sealer into those that the proxy returns to clients.
type sealer struct{ *rule.Sealer }

var _ proxy.Sealer = sealer{}

// Seal implements [proxy.Sealer].
func (s sealer) Seal(ctx context.Context, dst, key, value []byte) ([]byte, error) {
	out, err := s.SealTo(ctx, dst, key, value)
	return out, sealError(ctx, err)
}

// Open implements [proxy.Sealer].
func (s sealer) Open(ctx context.Context, dst, key, stored []byte) ([]byte, error) {
	out, err := s.Sealer.Open(ctx, dst, key, stored)
	return out, sealError(ctx, err)
}

// TrySeal implements [proxy.Sealer].
func (s sealer) TrySeal(dst, key, value []byte) ([]byte, error) {
	out, err := s.Sealer.TrySeal(dst, key, value)
	return out, sealError(context.Background(), err)
}

// TryOpen implements [proxy.Sealer].
func (s sealer) TryOpen(dst, key, stored []byte) ([]byte, error) {
	out, err := s.Sealer.TryOpen(dst, key, stored)
	return out, sealError(context.Background(), err)
}

// sealError returns what an error of a keyring means for the client.
func sealError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, keyring.ErrWouldBlock) {
		return proxy.ErrWouldBlock
	}
	e, ok := errors.AsType[*keyring.Error](err)
	if !ok {
		return err
	}
	var code codes.Code
	switch e.Kind {
	case keyring.Unavailable:
		// A client that went away, or whose deadline passed, gets its own error.
		if cause := ctx.Err(); cause != nil {
			return cause
		}
		code = codes.Unavailable
	case keyring.SeedRefused, keyring.KeyUnusable, keyring.Refused:
		code = codes.FailedPrecondition
	case keyring.Corrupt, keyring.Plaintext:
		code = codes.DataLoss
	default:
		return err
	}
	return &proxy.SealError{Code: code, Text: e.Text}
}

// requiredAudit is a sealer that works only while the audit log can be written.
type requiredAudit struct {
	proxy.Sealer
	audit *auditlog.Recorder
}

// auditedSealer returns s, or s behind a required audit log.
func auditedSealer(audit *auditlog.Recorder, s proxy.Sealer) proxy.Sealer {
	if !audit.Required() {
		return s
	}
	return requiredAudit{s, audit}
}

// Seal implements [proxy.Sealer].
func (s requiredAudit) Seal(ctx context.Context, dst, key, value []byte) (out []byte, err error) {
	err = s.audit.Do(func() error { out, err = s.Sealer.Seal(ctx, dst, key, value); return err })
	return forClient(out, err)
}

// Open implements [proxy.Sealer].
func (s requiredAudit) Open(ctx context.Context, dst, key, stored []byte) (out []byte, err error) {
	err = s.audit.Do(func() error { out, err = s.Sealer.Open(ctx, dst, key, stored); return err })
	return forClient(out, err)
}

// TrySeal implements [proxy.Sealer].
func (s requiredAudit) TrySeal(dst, key, value []byte) (out []byte, err error) {
	err = s.audit.Do(func() error { out, err = s.Sealer.TrySeal(dst, key, value); return err })
	return forClient(out, err)
}

// TryOpen implements [proxy.Sealer].
func (s requiredAudit) TryOpen(dst, key, stored []byte) (out []byte, err error) {
	err = s.audit.Do(func() error { out, err = s.Sealer.TryOpen(dst, key, stored); return err })
	return forClient(out, err)
}

func forClient(out []byte, err error) ([]byte, error) {
	if errors.Is(err, auditlog.ErrUnwritable) {
		err = &proxy.SealError{Code: codes.Unavailable, Text: auditlog.ErrUnwritable.Error()}
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

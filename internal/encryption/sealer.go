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
		rules[i] = proxy.Rule{Prefix: s.config[i].Prefix, Sealer: sealer{s.sealers[i], s.audit}}
	}
	return rules
}

// sealer encrypts and decrypts only while a required audit log can be written. It turns the errors
// of a keyring's sealer into those that the proxy returns to clients.
type sealer struct {
	*rule.Sealer
	audit *auditlog.Log
}

var _ proxy.Sealer = sealer{}

// Seal implements [proxy.Sealer].
func (s sealer) Seal(ctx context.Context, key, value []byte) ([]byte, error) {
	return s.audited(ctx, func() ([]byte, error) { return s.Sealer.Seal(ctx, key, value) })
}

// Open implements [proxy.Sealer].
func (s sealer) Open(ctx context.Context, dst, key, stored []byte) ([]byte, error) {
	return s.audited(ctx, func() ([]byte, error) { return s.Sealer.Open(ctx, dst, key, stored) })
}

// TrySeal implements [proxy.Sealer].
func (s sealer) TrySeal(key, value []byte) ([]byte, error) {
	return s.audited(context.Background(), func() ([]byte, error) { return s.Sealer.TrySeal(key, value) })
}

// TryOpen implements [proxy.Sealer].
func (s sealer) TryOpen(dst, key, stored []byte) ([]byte, error) {
	return s.audited(context.Background(), func() ([]byte, error) { return s.Sealer.TryOpen(dst, key, stored) })
}

// audited returns the result of f, if it may be used.
func (s sealer) audited(ctx context.Context, f func() ([]byte, error)) (out []byte, err error) {
	err = s.audit.Do(func() error { out, err = f(); return err })
	if err != nil {
		return nil, sealError(ctx, err)
	}
	return out, nil
}

// sealError returns what an error of a keyring or of the audit log means for the client.
func sealError(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, keyring.ErrWouldBlock):
		return proxy.ErrWouldBlock
	case errors.Is(err, auditlog.ErrUnwritable):
		return &proxy.SealError{Code: codes.Unavailable, Text: auditlog.ErrUnwritable.Error()}
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

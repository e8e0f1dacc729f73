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
func (s sealer) Seal(ctx context.Context, dst, key, value []byte) (out []byte, err error) {
	action, err := s.audit.Begin()
	if err == nil {
		out, err = s.SealTo(ctx, dst, key, value)
	}
	return result(ctx, action, out, err)
}

// Open implements [proxy.Sealer].
func (s sealer) Open(ctx context.Context, dst, key, stored []byte) (out []byte, err error) {
	action, err := s.audit.Begin()
	if err == nil {
		out, err = s.Sealer.Open(ctx, dst, key, stored)
	}
	return result(ctx, action, out, err)
}

// TrySeal implements [proxy.Sealer].
func (s sealer) TrySeal(dst, key, value []byte) (out []byte, err error) {
	action, err := s.audit.Begin()
	if err == nil {
		out, err = s.Sealer.TrySeal(dst, key, value)
	}
	return result(context.Background(), action, out, err)
}

// TryOpen implements [proxy.Sealer].
func (s sealer) TryOpen(dst, key, stored []byte) (out []byte, err error) {
	action, err := s.audit.Begin()
	if err == nil {
		out, err = s.Sealer.TryOpen(dst, key, stored)
	}
	return result(context.Background(), action, out, err)
}

// result returns out if it may be used: nothing failed, and no record of the action was lost.
func result(ctx context.Context, action auditlog.Action, out []byte, err error) ([]byte, error) {
	if err == nil {
		err = action.End()
	}
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

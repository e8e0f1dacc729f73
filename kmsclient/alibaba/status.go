package alibaba

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aliyun/alibaba-cloud-sdk-go/services/kms"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// Status reports the version that Encrypt would use now. A key that cannot be used is an error of
// [kmsclient.ClassKeyUnusable]. A dedicated instance's endpoint does not describe keys; there, a
// data key is generated and discarded, which shows the current version and that the key works. So
// it is when DescribeKey is throttled, whose small quota the whole account shares.
func (b *Backend) Status(ctx context.Context) (*service.StatusResponse, error) {
	const op = "Status"
	info, err := b.describe(ctx, op)
	if isUnsupported(err) || isThrottled(err) {
		key, generateErr := b.GenerateDataKey(ctx, "")
		if generateErr == nil {
			clear(key.Plaintext)
			return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: key.KeyID}, nil
		}
		// a caller that may only read is not allowed to, which says nothing of a key whose
		// description is throttled
		if e, ok := errors.AsType[*kmsclient.Error](generateErr); ok && (isUnsupported(err) || e.Class() == kmsclient.ClassKeyUnusable) {
			e.Op = op
			return nil, generateErr
		}
	}
	if err != nil {
		return nil, err
	}
	if err := checkState(op, info); err != nil {
		return nil, err
	}
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: info.KeyID}, nil
}

// Describe returns what the KMS knows of the key, in whatever state it is.
func (b *Backend) Describe(ctx context.Context) (*kmsclient.KeyInfo, error) {
	return b.describe(ctx, "DescribeKey")
}

func (b *Backend) describe(ctx context.Context, op string) (*kmsclient.KeyInfo, error) {
	resp, err := call(ctx, b, op, func(c *kms.Client) (*kms.DescribeKeyResponse, error) {
		req := kms.CreateDescribeKeyRequest()
		req.KeyId = b.keyID
		return c.DescribeKey(req)
	})
	if err != nil {
		return nil, err
	}
	kmsclient.NoteRequestID(ctx, safeRequestID(resp.RequestId))
	m := resp.KeyMetadata
	if m.KeyState == "" {
		return nil, contractError(op, resp.RequestId, b.keyID, "the answer names no key state")
	}
	// A key that still waits for its material has no version to name.
	keyID := b.keyID
	if m.PrimaryKeyVersion != "" || m.KeyState == "Enabled" {
		if keyID, err = b.reportedKey(op, resp.RequestId, m.KeyId, m.PrimaryKeyVersion); err != nil {
			return nil, err
		}
	}
	rotation := kmsclient.SettingOf(m.AutomaticRotation == "Enabled")
	if rotation == kmsclient.Off && m.Origin == "EXTERNAL" {
		rotation = kmsclient.Unsupported // the KMS cannot rotate imported material
	}
	return &kmsclient.KeyInfo{
		KeyID: keyID, RequestID: safeRequestID(resp.RequestId), State: m.KeyState, Usable: m.KeyState == "Enabled", Spec: m.KeySpec,
		ProtectionLevel: m.ProtectionLevel, Creator: m.Creator, OfService: isService(m.Creator),
		AutomaticRotation: m.AutomaticRotation, Rotation: rotation, DeletionProtection: kmsclient.SettingOf(m.DeletionProtection == "Enabled"),
		NextRotation: parseTime(m.NextRotationDate), DeleteAt: parseTime(m.DeleteDate), MaterialExpiresAt: parseTime(m.MaterialExpireTime),
	}, nil
}

// isService reports whether a key's creator is a product of the cloud. An account is a number, some
// digits of which may be hidden.
func isService(creator string) bool { return strings.Trim(creator, "0123456789*") != "" }

// checkState returns the error that Encrypt would meet in the key's state, or nil.
func checkState(op string, info *kmsclient.KeyInfo) error {
	e := &kmsclient.Error{Op: op, HTTPStatus: http.StatusOK, RequestID: info.RequestID, KeyID: info.KeyID}
	switch info.State {
	case "Enabled":
		return nil
	case "Disabled", "PendingDeletion", "PendingImport":
		e.Code = "Rejected." + info.State
		e.Reason, e.Detail = reasonOfCode(e.Code, http.StatusConflict)
	default:
		e.Reason, e.Detail = kmsclient.BrokenContract, "the key is in an unknown state"
	}
	return e
}

// isUnsupported reports whether err says that the endpoint has no such operation.
func isUnsupported(err error) bool {
	e, ok := errors.AsType[*kmsclient.Error](err)
	return ok && slices.Contains([]string{"UnsupportedOperation", "InvalidAction", "InvalidAction.NotFound", "InvalidApi.NotFound"}, e.Code)
}

// isThrottled reports whether err says that there were too many calls.
func isThrottled(err error) bool {
	e, ok := errors.AsType[*kmsclient.Error](err)
	return ok && e.Class() == kmsclient.ClassUnavailable &&
		(e.HTTPStatus == http.StatusTooManyRequests || e.Code == "Rejected.Throttling" || strings.HasPrefix(e.Code, "Throttling"))
}

// parseTime reads one of the KMS' times (UTC, "2006-01-02T15:04:05Z"); what it cannot read is zero.
func parseTime(s string) time.Time {
	t, _ := time.Parse(time.RFC3339, s) // zero with an error
	return t
}

package alibaba

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"regexp"
	"strings"

	sdkerrors "github.com/aliyun/alibaba-cloud-sdk-go/sdk/errors"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// failure is a failed attempt: a safe error, and what the next attempt should change.
type failure struct {
	err      *kmsclient.Error
	stale    bool   // the connection was dead before the request was sent
	rejected bool   // the KMS did not accept the credentials
	message  string // the KMS' own words, see safeMessage; may be empty

	noCredentials bool // there was no attempt for lack of credentials
}

// withContext returns the failure's error, which also wraps the context's if that has ended.
func (f *failure) withContext(ctx context.Context) error {
	cause := ctx.Err()
	if cause == nil || f.err.Class() != kmsclient.ClassUnavailable || f.err.Code != "" {
		return f.err
	}
	f.err.Detail = "the call was cancelled"
	if errors.Is(cause, context.DeadlineExceeded) {
		f.err.Detail = "the KMS did not answer in time"
		if f.noCredentials {
			f.err.Detail = "no credentials came in time"
		}
	}
	return kmsclient.WithCause(f.err, cause)
}

// contractError is the error for an answer that says success and does not hold what it must.
func contractError(op, requestID, keyID, detail string) *kmsclient.Error {
	return &kmsclient.Error{
		Op: op, Reason: kmsclient.BrokenContract, HTTPStatus: http.StatusOK, RequestID: safeRequestID(requestID), KeyID: keyID, Detail: detail,
	}
}

// panicked is the failure of an attempt that the SDK did not survive.
func (r *remote) panicked(op string, t *callTransport) *failure {
	e := &kmsclient.Error{
		Op: op, KeyID: r.keyID, HTTPStatus: int(t.status.Load()),
		Detail: "the Alibaba Cloud SDK could not parse the answer",
	}
	e.Reason = reasonOfStatus(e.HTTPStatus)
	return &failure{err: e}
}

// failed turns an error of the SDK into a failure. The error's text is not kept, since the SDK
// quotes URLs, and the KMS quotes the string that was signed; only what safeMessage lets through
// is.
func (r *remote) failed(op string, cred credential, t *callTransport, err error) *failure {
	e := &kmsclient.Error{Op: op, KeyID: r.keyID, HTTPStatus: int(t.status.Load())}
	f := &failure{err: e}
	server, ok := errors.AsType[*sdkerrors.ServerError](err)
	if !ok {
		e.Detail = r.explain(err)
		switch {
		case errors.Is(err, errTooLarge):
			e.Reason = kmsclient.BrokenContract
		case isNotJSON(err):
			e.Detail = "the answer is not JSON: something other than " + r.name + " gave it"
		case e.HTTPStatus == 0:
			f.stale = t.stale()
		}
		return f
	}
	e.HTTPStatus = server.HttpStatus()
	e.RequestID = cred.scrub(safeRequestID(server.RequestId()))
	e.Code = cred.scrub(safeCode(server.ErrorCode()))
	if server.ErrorCode() == "" {
		e.Reason, e.Detail = reasonOfStatus(e.HTTPStatus), "the answer has no error code: something other than "+r.name+" may have given it"
		return f
	}
	e.Reason, e.Detail = reasonOfCode(server.ErrorCode(), e.HTTPStatus)
	if r.aliasLeadsNowhere(op, server.ErrorCode()) {
		e.Reason, e.Detail = kmsclient.AliasNotFound, "the alias leads to no key: nothing is encrypted until it does"
	}
	if e.Reason != kmsclient.Unreachable {
		f.message = cred.scrub(r.safeMessage(server.Message()))
		e.Detail = strings.TrimPrefix(e.Detail+f.message, "; ")
	} else if e.HTTPStatus == http.StatusConflict {
		e.Reason = kmsclient.Failing // the state of one key, or of the call
	}
	f.rejected = isRejection(server.ErrorCode())
	return f
}

// explain describes in words of this package why there was no response.
func (r *remote) explain(err error) string {
	for _, known := range []error{errRedirect, errTooLarge, errForeign} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	operation, _ := errors.AsType[*net.OpError](err)
	switch {
	case isA[x509.UnknownAuthorityError](err):
		return fmt.Sprintf("the certificate of %s is signed by an unknown authority (see %s)", r.endpoint, r.caField)
	case isA[x509.HostnameError](err):
		return fmt.Sprintf("the certificate of %s is for another name", r.endpoint)
	case isA[x509.CertificateInvalidError](err):
		return fmt.Sprintf("the certificate of %s is not valid (expired, or not for servers)", r.endpoint)
	case isA[*net.DNSError](err):
		return fmt.Sprintf("the name of %s was not resolved", r.endpoint)
	case operation != nil && operation.Op == "dial":
		return fmt.Sprintf("%s cannot be connected to", r.endpoint)
	}
	return fmt.Sprintf("the connection to %s failed before a complete answer", r.endpoint)
}

// isA reports whether err is or wraps an error of a type.
func isA[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

func isNotJSON(err error) bool {
	client, ok := errors.AsType[*sdkerrors.ClientError](err)
	return ok && client.ErrorCode() == sdkerrors.JsonUnmarshalErrorCode
}

// reasonOfStatus is for answers without one of the vendor's codes, which the KMS itself may never
// have seen. It never says that a key or a ciphertext is bad: only the KMS can know.
func reasonOfStatus(status int) kmsclient.Reason {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired:
		return kmsclient.Denied
	case http.StatusRequestTimeout, http.StatusTooManyRequests, 0:
		return kmsclient.Unreachable
	}
	if status >= 500 {
		return kmsclient.Unreachable
	}
	return kmsclient.BrokenContract
}

// reasonOfCode says what one of the vendor's codes means, with a hint where there is one: the codes
// of the product Kms and those of the gateway before it. Only a code that is known to concern the
// request means that a ciphertext is damaged, and only then is the value given up. Unknown codes
// are classified by their status, and mean nothing for the value.
func reasonOfCode(code string, status int) (kmsclient.Reason, string) {
	switch code {
	case "Rejected.Throttling", "ServiceUnavailableTemporary", "ServiceUnavailable", "InternalFailure", "SignatureNonceUsed":
		return kmsclient.Unreachable, ""
	case "Rejected.Unavailable":
		return kmsclient.Unreachable, "the KMS says that the key is temporarily unavailable"
	case "Rejected.Disabled":
		return kmsclient.KeyDisabled, "the key is disabled"
	case "Rejected.PendingDeletion":
		return kmsclient.KeyGone, "the key is scheduled for deletion"
	case "Rejected.PendingImport":
		return kmsclient.KeyGone, "the key waits for its material to be imported"
	case "Forbidden.KeyNotFound":
		return kmsclient.KeyNotFound, "the KMS does not know the key"
	case "Forbidden.AliasNotFound":
		return kmsclient.KeyGone, "the KMS does not know the key"
	case "IncompleteSignature", "SignatureDoesNotMatch":
		return kmsclient.Denied, "the signature was refused: the access key secret is probably wrong"
	case "IllegalTimestamp", "RequestTimeTooSkewed":
		return kmsclient.Denied, clockHint
	case "Forbidden.NoPermission":
		return kmsclient.Denied, "the caller lacks the permission for this operation on this key"
	}
	switch family, _, _ := strings.Cut(code, "."); family {
	case "Throttling":
		return kmsclient.Unreachable, ""
	case "InvalidTimeStamp":
		return kmsclient.Denied, clockHint
	case "InvalidAccessKeyId":
		return kmsclient.Denied, "the access key is not known or not active"
	case "InvalidSecurityToken", "MissingSecurityToken":
		return kmsclient.Denied, "the security token is missing, wrong or expired"
	case "Forbidden":
		return kmsclient.Denied, ""
	}
	switch {
	case status >= 500, status == http.StatusTooManyRequests, status == http.StatusRequestTimeout:
		return kmsclient.Unreachable, ""
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return kmsclient.Denied, ""
	case strings.HasPrefix(code, "InvalidParameter"), strings.HasPrefix(code, "InvalidCiphertext"):
		return kmsclient.Invalid, ""
	case status == http.StatusConflict: // the state of something, which changes
		return kmsclient.Unreachable, ""
	}
	return kmsclient.BrokenContract, ""
}

// aliasLeadsNowhere reports whether a code is about the configured name and not about a key.
// Decrypt names no key: there it is about the value's.
func (r *remote) aliasLeadsNowhere(op, code string) bool {
	return (code == "Forbidden.AliasNotFound" || code == "Forbidden.KeyNotFound") && op != "Decrypt" && r.keyID != "" && realID(r.keyID) == ""
}

const clockHint = "the clocks differ by more than 15 minutes"

// isRejection reports whether other credentials may be accepted where these were not.
func isRejection(code string) bool {
	switch family, _, _ := strings.Cut(code, "."); family {
	case "InvalidAccessKeyId", "InvalidSecurityToken", "MissingSecurityToken", "SignatureDoesNotMatch", "IncompleteSignature":
		return true
	}
	return false
}

var (
	codePattern      = regexp.MustCompile(`^[A-Z][A-Za-z]{2,39}(\.[A-Za-z][A-Za-z0-9]{1,39}){0,3}$`)
	requestIDPattern = regexp.MustCompile(`^[0-9A-Fa-f]{8}(-?[0-9A-Fa-f]{4}){3}-?[0-9A-Fa-f]{12}$`)
)

// safeCode returns the code if it is well-formed, because a response could contain anything.
func safeCode(code string) string {
	if codePattern.MatchString(code) {
		return code
	}
	return ""
}

// safeRequestID returns the request ID if it is a UUID, as the vendor's are.
func safeRequestID(id string) string {
	if requestIDPattern.MatchString(id) {
		return id
	}
	return ""
}

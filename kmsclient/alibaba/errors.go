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
	said     string // the KMS' own words, see say; may be empty

	noCredentials bool // there was no attempt for lack of credentials
}

// withContext returns the failure's error, which also wraps the context's if that has ended.
func (f *failure) withContext(ctx context.Context) error {
	cause := ctx.Err()
	if cause == nil || f.err.Class != kmsclient.ClassUnavailable || f.err.Code != "" {
		return f.err
	}
	f.err.Detail = "the call was cancelled"
	if errors.Is(cause, context.DeadlineExceeded) {
		f.err.Detail = "the KMS did not answer in time"
		if f.noCredentials {
			f.err.Detail = "no credentials came in time"
		}
	}
	return &contextError{kms: f.err, cause: cause}
}

// contextError is a KMS error that is due to the caller's context.
type contextError struct {
	kms   *kmsclient.Error
	cause error
}

func (e *contextError) Error() string   { return e.kms.Error() }
func (e *contextError) Unwrap() []error { return []error{e.kms, e.cause} }

// contractError is the error for an answer that says success and does not hold what it must.
func contractError(op, requestID, keyID, detail string) *kmsclient.Error {
	return &kmsclient.Error{
		Op: op, Class: kmsclient.ClassContract, HTTPStatus: http.StatusOK, RequestID: safeRequestID(requestID), KeyID: keyID, Detail: detail,
	}
}

// panicked is the failure of an attempt that the SDK did not survive.
func (r *remote) panicked(op string, t *callTransport) *failure {
	e := &kmsclient.Error{
		Op: op, KeyID: r.keyID, HTTPStatus: int(t.status.Load()),
		Detail: "the Alibaba Cloud SDK could not parse the answer",
	}
	e.Class = classOfStatus(e.HTTPStatus)
	return &failure{err: e}
}

// failed turns an error of the SDK into a failure. The error's text is not kept, since the SDK quotes URLs, and the KMS quotes the string that
// was signed; only what say lets through is.
func (r *remote) failed(op string, cred credential, t *callTransport, err error) *failure {
	e := &kmsclient.Error{Op: op, KeyID: r.keyID, HTTPStatus: int(t.status.Load())}
	f := &failure{err: e}
	var server *sdkerrors.ServerError
	if !errors.As(err, &server) {
		e.Class, e.Detail = kmsclient.ClassUnavailable, r.explain(err)
		switch {
		case errors.Is(err, errTooLarge):
			e.Class = kmsclient.ClassContract
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
		e.Class, e.Detail = classOfStatus(e.HTTPStatus), "the answer has no error code: something other than "+r.name+" may have given it"
		return f
	}
	e.Class, e.Detail = classOfCode(server.ErrorCode(), e.HTTPStatus)
	e.Missing = server.ErrorCode() == "Forbidden.KeyNotFound"
	if r.aliasLeadsNowhere(op, server.ErrorCode()) {
		e.Alias, e.Missing, e.Detail = true, false, "the alias leads to no key: nothing is sealed until it does"
	}
	if e.Class != kmsclient.ClassUnavailable {
		f.said = cred.scrub(r.say(server.Message()))
		e.Detail = strings.TrimPrefix(e.Detail+f.said, "; ")
	}
	e.Gone = isGone(server.ErrorCode())
	e.Answered = e.Class == kmsclient.ClassUnavailable && e.HTTPStatus == http.StatusConflict // the state of one key, or of the call
	f.rejected = isRejection(server.ErrorCode())
	return f
}

// explain says in words of our own why no answer came.
func (r *remote) explain(err error) string {
	var (
		unknown   x509.UnknownAuthorityError
		hostname  x509.HostnameError
		invalid   x509.CertificateInvalidError
		dns       *net.DNSError
		operation *net.OpError
	)
	switch {
	case errors.Is(err, errRedirect), errors.Is(err, errTooLarge), errors.Is(err, errForeign):
		for _, known := range []error{errRedirect, errTooLarge, errForeign} {
			if errors.Is(err, known) {
				return known.Error()
			}
		}
	case errors.As(err, &unknown):
		return fmt.Sprintf("the certificate of %s is signed by an unknown authority (see %s)", r.endpoint, r.caField)
	case errors.As(err, &hostname):
		return fmt.Sprintf("the certificate of %s is for another name", r.endpoint)
	case errors.As(err, &invalid):
		return fmt.Sprintf("the certificate of %s is not valid (expired, or not for servers)", r.endpoint)
	case errors.As(err, &dns):
		return fmt.Sprintf("the name of %s was not resolved", r.endpoint)
	case errors.As(err, &operation) && operation.Op == "dial":
		return fmt.Sprintf("%s cannot be connected to", r.endpoint)
	}
	return fmt.Sprintf("the connection to %s failed before a complete answer", r.endpoint)
}

func isNotJSON(err error) bool {
	var client *sdkerrors.ClientError
	return errors.As(err, &client) && client.ErrorCode() == sdkerrors.JsonUnmarshalErrorCode
}

// classOfStatus is for answers without one of the vendor's codes, which the KMS itself may never have seen. It never says that a key or
// a ciphertext is bad: only the KMS can know.
func classOfStatus(status int) kmsclient.Class {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired:
		return kmsclient.ClassDenied
	case http.StatusRequestTimeout, http.StatusTooManyRequests, 0:
		return kmsclient.ClassUnavailable
	}
	if status >= 500 {
		return kmsclient.ClassUnavailable
	}
	return kmsclient.ClassContract
}

// classOfCode says what one of the vendor's codes means, with a hint where there is one: the codes of the product Kms and those of
// the gateway before it. Only a code that is known to be about what was sent says that a ciphertext is damaged: a value is given up for that.
// What is not known here is judged by its status, and says nothing of the value.
func classOfCode(code string, status int) (kmsclient.Class, string) {
	switch code {
	case "Rejected.Throttling", "ServiceUnavailableTemporary", "ServiceUnavailable", "InternalFailure", "SignatureNonceUsed":
		return kmsclient.ClassUnavailable, ""
	case "Rejected.Unavailable":
		return kmsclient.ClassUnavailable, "the KMS says that the key is temporarily unavailable"
	case "Rejected.Disabled":
		return kmsclient.ClassKeyUnusable, "the key is disabled"
	case "Rejected.PendingDeletion":
		return kmsclient.ClassKeyUnusable, "the key is scheduled for deletion"
	case "Rejected.PendingImport":
		return kmsclient.ClassKeyUnusable, "the key waits for its material to be imported"
	case "Forbidden.KeyNotFound", "Forbidden.AliasNotFound":
		return kmsclient.ClassKeyUnusable, "the KMS does not know the key"
	case "IncompleteSignature", "SignatureDoesNotMatch":
		return kmsclient.ClassDenied, "the signature was refused: the access key secret is probably wrong"
	case "IllegalTimestamp", "RequestTimeTooSkewed":
		return kmsclient.ClassDenied, clockHint
	case "Forbidden.NoPermission":
		return kmsclient.ClassDenied, "the caller lacks the permission for this operation on this key"
	}
	switch family, _, _ := strings.Cut(code, "."); family {
	case "Throttling":
		return kmsclient.ClassUnavailable, ""
	case "InvalidTimeStamp":
		return kmsclient.ClassDenied, clockHint
	case "InvalidAccessKeyId":
		return kmsclient.ClassDenied, "the access key is not known or not active"
	case "InvalidSecurityToken", "MissingSecurityToken":
		return kmsclient.ClassDenied, "the security token is missing, wrong or expired"
	case "Forbidden":
		return kmsclient.ClassDenied, ""
	}
	switch {
	case status >= 500, status == http.StatusTooManyRequests, status == http.StatusRequestTimeout:
		return kmsclient.ClassUnavailable, ""
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return kmsclient.ClassDenied, ""
	case strings.HasPrefix(code, "InvalidParameter"), strings.HasPrefix(code, "InvalidCiphertext"):
		return kmsclient.ClassInvalid, ""
	case status == http.StatusConflict: // the state of something, which changes
		return kmsclient.ClassUnavailable, ""
	}
	return kmsclient.ClassContract, ""
}

// aliasLeadsNowhere reports whether a code is about the configured name and not about a key. Decrypt names no key: there it is about the value's.
func (r *remote) aliasLeadsNowhere(op, code string) bool {
	return (code == "Forbidden.AliasNotFound" || code == "Forbidden.KeyNotFound") && op != "Decrypt" && r.keyID != "" && realID(r.keyID) == ""
}

// isGone reports whether a code says that the key is lost, or will be. Rejected.Disabled is none of them: who disables a key means to stop its use.
func isGone(code string) bool {
	switch code {
	case "Rejected.PendingDeletion", "Rejected.PendingImport", "Forbidden.KeyNotFound", "Forbidden.AliasNotFound":
		return true
	}
	return false
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

// safeCode returns the code if it looks like one; an answer could put anything there.
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

package kmsclient

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// The limits of the stored format and of Kubernetes' KMS v2, in bytes.
const (
	maxPlaintext   = 6 << 10
	maxCiphertext  = envelope.MaxSource
	maxKeyID       = envelope.MaxKeyID
	maxAnnotations = envelope.MaxAnnotations
	dataKeySize    = 32
)

// errCircuitOpen is in the error of a call that was not made.
var errCircuitOpen = errors.New("circuit open")

func contract(detail string) *Error {
	return &Error{Reason: BrokenContract, Detail: "the KMS answered with " + detail}
}

func (c *Client) fault(op, keyID string, reason Reason, detail string) *Error {
	return &Error{Op: op, Provider: c.cfg.Name, Reason: reason, KeyID: keyID, Detail: detail}
}

// checkWrapped checks a wrapped secret against the limits of what can be stored.
func checkWrapped(ciphertext []byte, keyID string, annotations map[string][]byte) error {
	if n := len(ciphertext); n == 0 || n > maxCiphertext {
		return contract(fmt.Sprintf("a wrapped key of %d bytes; 1 to %d can be stored", n, maxCiphertext))
	}
	if err := checkKeyID(keyID); err != nil {
		return err
	}
	total := 0
	for k, v := range annotations {
		total += len(k) + len(v)
		if !envelope.IsAnnotationKey(k) {
			return contract("an annotation whose key is not a fully qualified domain name")
		}
	}
	if total > maxAnnotations {
		return contract(fmt.Sprintf("annotations of %d bytes; %d can be stored", total, maxAnnotations))
	}
	return nil
}

func checkKeyID(id string) error {
	if len(id) == 0 || len(id) > maxKeyID {
		return contract(fmt.Sprintf("a key ID of %d bytes; 1 to %d can be stored", len(id), maxKeyID))
	}
	if !utf8.ValidString(id) {
		return contract("a key ID that is not UTF-8")
	}
	return nil
}

func checkStatus(res *service.StatusResponse) error {
	switch {
	case res.Version != "v2" && res.Version != "v2beta1":
		return contract("a version of the KMS API that is neither v2 nor v2beta1")
	case res.Healthz != "ok":
		e := &Error{Reason: Unhealthy, Detail: fmt.Sprintf("the KMS says that it is not healthy: %s", quoted(res.Healthz))}
		if checkKeyID(res.KeyID) == nil {
			e.KeyID = res.KeyID
		}
		return e
	}
	return checkKeyID(res.KeyID)
}

// maxHealth limits a KMS' own text about its health, in bytes.
const maxHealth = 256

// quoted returns text of a KMS for a log or a report: on one line, without control characters, and
// shortened. A Status request holds nothing secret that the response could repeat.
func quoted(text string) string {
	if len(text) > maxHealth {
		return strconv.Quote(strings.ToValidUTF8(text[:maxHealth], "")) + "…"
	}
	return strconv.Quote(text)
}

// noteDown remembers why the KMS is unavailable, for the errors of calls that are not made while
// the circuit is open.
func (c *circuit) noteDown(err error) {
	if e := asError(err); e != nil && isSilent(err) && !errors.Is(err, context.Canceled) {
		c.down.Store(e)
	}
}

// notCalled returns the error of a call that is not made, with the code and the detail of the last
// failed call.
func (c *Client) notCalled(op, keyID string, last *Error) *Error {
	e := c.fault(op, keyID, Unreachable, fmt.Sprintf("not called, since it did not answer before; tried again every %s", c.cfg.ProbeAfter))
	if last != nil {
		e.Code, e.HTTPStatus = last.Code, last.HTTPStatus
		if last.Detail != "" {
			e.Detail += "; the last call failed: " + last.Detail
		}
	}
	return e
}

// asError returns the *Error in err, or nil.
func asError(err error) *Error {
	e, _ := errors.AsType[*Error](err)
	return e
}

// isSilent reports whether a failed call says that the KMS does not answer.
func isSilent(err error) bool { return ReasonOf(err) == Unreachable }

// safe returns an error that is safe to show for any error of a backend: the text of an error that
// is not an *Error may hold the request.
func (c *Client) safe(ctx context.Context, op, keyID string, err error) error {
	cause := ctx.Err()
	if cause == nil && errors.Is(err, context.DeadlineExceeded) {
		cause = context.DeadlineExceeded // of the attempt
	}
	if e := asError(err); e != nil {
		own := *e
		own.Op, own.Provider, own.KeyID = op, c.cfg.Name, cmp.Or(e.KeyID, keyID)
		return WithCause(&own, cause)
	}
	detail := "the call failed for a reason that is not shown, since it may hold a secret"
	if errors.Is(err, context.DeadlineExceeded) {
		detail = fmt.Sprintf("no answer within %s", c.cfg.Timeout)
	} else if errors.Is(err, context.Canceled) {
		detail = "the caller canceled"
	}
	return WithCause(c.fault(op, keyID, Unreachable, detail), cause)
}

// caused is an *Error with a cause that errors.Is finds. Its text is that of the *Error.
type caused struct {
	what  *Error
	cause error
}

func (c caused) Error() string   { return c.what.Error() }
func (c caused) Unwrap() []error { return []error{c.what, c.cause} }

// WithCause returns e, or an error with the text of e that wraps e and the cause, if there is one.
func WithCause(e *Error, cause error) error {
	if cause == nil {
		return e
	}
	return caused{e, cause}
}

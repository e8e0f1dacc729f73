package kmsclient

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/sony/gobreaker/v2"
	"k8s.io/kms/pkg/service"
)

// Call is one attempt of one operation, for metrics and audit records. It holds nothing secret.
type Call struct {
	Provider string
	Op       string // "Encrypt", "Decrypt", "Status" or "GenerateDataKey"
	KeyID    string // from the response or the request; may be empty
	// the KMS' own id of the request, to join with its audit log; may be empty
	RequestID string
	Class     string        // "ok", or the error's class
	Time      time.Time     // when the attempt began
	Duration  time.Duration // how long it took
}

// Config configures a [Client]. The zero value of each field but Name and Backend is the default
// that it names.
type Config struct {
	Name    string        // the provider's name, for errors and calls
	Backend Service       // may implement [DataKeyGenerator]
	Timeout time.Duration // of one attempt; default 3 s
	// of one operation; default 3, of one that the KMS answers with an unknown fault 2 at most; see
	// also [OneAttempt]
	MaxAttempts int
	MinBackoff  time.Duration // before a second attempt, with full jitter; default 100 ms, doubled each time up to 2 s
	// After BreakAfter attempts in a row without an answer (default 5) the circuit opens: calls
	// fail at once. After ProbeAfter (default 5 s), one call is made as a probe. Status has its own
	// circuit.
	BreakAfter int
	ProbeAfter time.Duration
	// Observer is called for each attempt, on the caller's goroutine; it must not block. May be
	// nil.
	Observer func(Call)
}

// Client calls a backend by the rules that all backends share. It is safe for concurrent use and
// starts no goroutine.
//
// Every error wraps [*Error]; one that a context ended wraps the context's error too.
type Client struct {
	cfg Config
	// Status and the use of the key fail independently: describing keys often has a small quota of
	// its own.
	status, use circuit
}

// circuit is a circuit breaker, and why the last call failed.
type circuit struct {
	breaker atomic.Pointer[breaker]
	down    atomic.Pointer[Error] // of the last call without an answer
}

type breaker = gobreaker.TwoStepCircuitBreaker[struct{}]

var (
	_ Service          = (*Client)(nil)
	_ DataKeyGenerator = (*Client)(nil)
)

// New wraps a backend. It makes no call.
func New(cfg Config) (*Client, error) {
	if cfg.Name == "" || cfg.Backend == nil {
		return nil, errors.New("a KMS client needs a name and a backend")
	}
	if cfg.Timeout < 0 || cfg.MaxAttempts < 0 || cfg.MinBackoff < 0 || cfg.BreakAfter < 0 || cfg.ProbeAfter < 0 {
		return nil, fmt.Errorf("kms %q: timeouts and limits must not be negative", cfg.Name)
	}
	cfg.Timeout = cmp.Or(cfg.Timeout, 3*time.Second)
	cfg.MaxAttempts = cmp.Or(cfg.MaxAttempts, 3)
	cfg.MinBackoff = cmp.Or(cfg.MinBackoff, 100*time.Millisecond)
	cfg.BreakAfter = cmp.Or(cfg.BreakAfter, 5)
	cfg.ProbeAfter = cmp.Or(cfg.ProbeAfter, 5*time.Second)
	if cfg.Observer == nil {
		cfg.Observer = func(Call) {}
	}
	c := &Client{cfg: cfg}
	c.status.breaker.Store(newBreaker(cfg))
	c.use.breaker.Store(newBreaker(cfg))
	return c, nil
}

func newBreaker(cfg Config) *breaker {
	limit := uint32(cfg.BreakAfter) //nolint:gosec // a small positive number
	return gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Name:        cfg.Name,
		Timeout:     cfg.ProbeAfter,
		ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= limit },
		// Only calls without an answer open the circuit.
		IsSuccessful: func(err error) bool { return err == nil || !isSilent(err) },
		// A canceled call says nothing about the KMS.
		IsExcluded: func(err error) bool { return errors.Is(err, context.Canceled) },
	})
}

// circuit returns the circuit of an operation.
func (c *Client) circuit(op string) *circuit {
	if op == opStatus {
		return &c.status
	}
	return &c.use
}

// Encrypt implements [Service]. data is 1 to 6,144 bytes.
func (c *Client) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	const op = "Encrypt"
	if len(data) == 0 || len(data) > maxPlaintext {
		return nil, c.fault(op, "", Invalid, fmt.Sprintf("%d bytes to wrap; 1 to %d can be", len(data), maxPlaintext))
	}
	return attempt(ctx, c, op, "", func(ctx context.Context) (*service.EncryptResponse, string, error) {
		res, err := c.cfg.Backend.Encrypt(ctx, uid, data)
		if err != nil {
			return nil, "", err
		}
		if res == nil {
			return nil, "", contract("an empty response")
		}
		return res, res.KeyID, checkWrapped(res.Ciphertext, res.KeyID, res.Annotations)
	})
}

// Decrypt implements [Service]. See [Expect] and [ExpectLength].
func (c *Client) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	const op = "Decrypt"
	if checkWrapped(req.Ciphertext, req.KeyID, req.Annotations) != nil {
		return nil, c.fault(op, "", Invalid, "the wrapped key, its key ID or its annotations exceed the limits of a KMS")
	}
	return attempt(ctx, c, op, req.KeyID, func(ctx context.Context) ([]byte, string, error) {
		data, err := c.cfg.Backend.Decrypt(ctx, uid, req)
		if err != nil {
			return nil, req.KeyID, err
		}
		if len(data) == 0 || len(data) > maxPlaintext {
			return nil, req.KeyID, contract(fmt.Sprintf("a plaintext of %d bytes", len(data)))
		}
		return data, req.KeyID, checkExpected(ctx, data)
	})
}

const opStatus = "Status"

// Status implements [Service]. A KMS that answers but is not healthy is an error of
// reason [Unhealthy] with the key ID of the answer and the KMS' own text, quoted and shortened.
func (c *Client) Status(ctx context.Context) (*service.StatusResponse, error) {
	return attempt(ctx, c, opStatus, "", func(ctx context.Context) (*service.StatusResponse, string, error) {
		res, err := c.cfg.Backend.Status(ctx)
		if err != nil {
			return nil, "", err
		}
		if res == nil {
			return nil, "", contract("an empty response")
		}
		return res, res.KeyID, checkStatus(res)
	})
}

// GenerateDataKey implements [DataKeyGenerator]. If the backend does not, the key is generated here
// and wrapped by Encrypt.
func (c *Client) GenerateDataKey(ctx context.Context, uid string) (*DataKey, error) {
	generator, ok := c.cfg.Backend.(DataKeyGenerator)
	if !ok {
		return WrapNewKey(ctx, c, uid)
	}
	return attempt(ctx, c, "GenerateDataKey", "", func(ctx context.Context) (*DataKey, string, error) {
		key, err := generator.GenerateDataKey(ctx, uid)
		if err != nil {
			return nil, "", err
		}
		if key == nil || len(key.Plaintext) != dataKeySize {
			return nil, "", contract(fmt.Sprintf("a data key that is not %d bytes long", dataKeySize))
		}
		return key, key.KeyID, checkWrapped(key.Ciphertext, key.KeyID, key.Annotations)
	})
}

// attempt makes a call until it succeeds or fails for good, or until its attempts are used up or
// ctx ends.
func attempt[T any](ctx context.Context, c *Client, op, keyID string, call func(context.Context) (T, string, error)) (T, error) {
	wait := backoff.ExponentialBackOff{
		// The delay is drawn from 0 to twice the middle: full jitter.
		InitialInterval: c.cfg.MinBackoff / 2, RandomizationFactor: 1, Multiplier: 2, MaxInterval: time.Second,
	}
	var last *Error // of the last attempt
	tries, single := 0, isSet(ctx, oneAttemptKey{})
	res, err := backoff.Retry(ctx, func() (T, error) {
		res, err := once(ctx, c, op, keyID, call)
		tries++
		last = asError(err)
		if err != nil && (single || ClassOf(err) != ClassUnavailable || !isSilent(err) && tries > 1 || errors.Is(err, errCircuitOpen) || ctx.Err() != nil) {
			err = backoff.Permanent(err)
		}
		return res, err
	}, backoff.WithBackOff(&wait), backoff.WithMaxTries(uint(c.cfg.MaxAttempts)), backoff.WithMaxElapsedTime(0))
	if err != nil && asError(err) == nil {
		// the context ended between two attempts; its cause may be anything
		err = WithCause(last, ctx.Err())
	}
	return res, err
}

// once makes one attempt. Its error is always an *Error with the provider filled in.
func once[T any](ctx context.Context, c *Client, op, keyID string, call func(context.Context) (T, string, error)) (res T, err error) {
	circuit := c.circuit(op)
	done, err := circuit.breaker.Load().Allow()
	switch {
	case err == nil:
	case isSet(ctx, pastCircuitKey{}):
		done, err = func(err error) {
			if err == nil {
				circuit.breaker.Store(newBreaker(c.cfg)) // closed: the KMS is there
			}
		}, nil
	default:
		return res, WithCause(c.notCalled(op, keyID, circuit.down.Load()), errCircuitOpen)
	}
	start := time.Now()
	noting, id := withRequestID(ctx)
	defer func() {
		if recover() != nil { // the value of the panic may hold a secret
			err = contract("the backend panicked")
		}
		if err != nil {
			var zero T
			other := errors.Is(err, ErrOtherSecret)
			if res, err = zero, c.safe(ctx, op, keyID, err); other {
				err = caused{asError(err), ErrOtherSecret}
			}
			circuit.noteDown(err)
		}
		done(err)
		c.cfg.Observer(observed(c.cfg.Name, op, keyID, id.get(), start, err))
	}()
	limited, cancel := context.WithTimeout(noting, c.cfg.Timeout)
	defer cancel()
	res, used, err := call(limited)
	keyID = cmp.Or(used, keyID)
	return res, err
}

// observed describes an attempt. noted is the request ID that the backend noted; that in an error
// takes precedence.
func observed(provider, op, keyID, noted string, start time.Time, err error) Call {
	call := Call{Provider: provider, Op: op, KeyID: keyID, RequestID: noted, Class: "ok", Time: start, Duration: time.Since(start)}
	if e := asError(err); e != nil {
		call.Class, call.RequestID = string(e.Class()), cmp.Or(e.RequestID, noted)
	}
	return call
}

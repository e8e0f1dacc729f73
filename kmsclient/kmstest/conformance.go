// Package kmstest has what the tests of KMS backends share: [Conformance] and
// [ConformanceUnderFaults], which every backend must pass; [Fault], which makes calls of any
// service fail in the ways a network can; [PluginServer], which serves any service as a Kubernetes
// KMS v2 plugin; and [Memory], a KMS in memory that behaves correctly.
package kmstest

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// The operations, as errors and counters spell them.
const (
	opEncrypt  = "Encrypt"
	opDecrypt  = "Decrypt"
	opStatus   = "Status"
	opGenerate = "GenerateDataKey"
)

// canary is the secret that the suite wraps: 32 bytes that no error may hold.
const canary = "Canary-secret-of-thirty-2-bytes!"

const uid = "kmstest"

// An Option says where a backend's limits differ from the contract's.
type Option func(*options)

type options struct {
	maxPlaintext int
	damaged      []kmsclient.Class
	opaque       bool
	garbage      bool
}

// MaxPlaintext is the largest plaintext that the backend takes, in bytes. The default is the
// contract's 6 KiB.
func MaxPlaintext(n int) Option { return func(o *options) { o.maxPlaintext = n } }

// DamagedClasses are the classes of error with which a damaged ciphertext may fail. The default is
// ClassInvalid only.
func DamagedClasses(classes ...kmsclient.Class) Option {
	return func(o *options) { o.damaged = classes }
}

// Opaque is for a backend whose KMS does not distinguish failures: any error passes,
// where one is due.
func Opaque() Option { return func(o *options) { o.opaque = true } }

// Garbage is for a backend whose KMS unwraps what is damaged, to something else than was wrapped.
func Garbage() Option { return func(o *options) { o.garbage = true } }

// Conformance runs the checks that every backend must pass, each as a subtest with a service of its
// own. newService returns a service that is ready for use, and cleans up through its t.
func Conformance(t *testing.T, newService func(t *testing.T) kmsclient.Service, opts ...Option) {
	t.Helper()
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			if err := runCheck(t.Context(), c, newService(t), opts...); err != nil {
				t.Error(err)
			}
		})
	}
}

// check is one demand. It returns errors rather than failing a test, so that the suite's own test
// can see it refuse a bad backend.
type check struct {
	name string
	run  func(context.Context, *subject) error
}

var checks = []check{
	{"round trips", roundTrips},
	{"limits of answers", responseLimits},
	{"wrapped secrets", wrappedSecrets},
	{"status", statusAgrees},
	{"data keys", dataKeys},
	{"concurrency", concurrency},
	{"cancelled", cancelled},
	{"deadline", expired},
	{"cancelled under way", cancelledUnderWay},
	{"damaged ciphertext", damagedCiphertext},
	{"unknown key", unknownKey},
	{"arguments", arguments},
	{"results", results},
	{"too long", tooLong},
}

// runCheck runs one check and then holds every error that the service returned against the canary.
func runCheck(ctx context.Context, c check, s kmsclient.Service, opts ...Option) error {
	o := options{maxPlaintext: 6 << 10, damaged: []kmsclient.Class{kmsclient.ClassInvalid}}
	for _, opt := range opts {
		opt(&o)
	}
	x := &subject{Service: s, options: o}
	x.generator, _ = s.(kmsclient.DataKeyGenerator)
	err := c.run(ctx, x)
	return errors.Join(err, x.leaks())
}

// subject is the service under test. It remembers the errors that the service returned.
type subject struct {
	kmsclient.Service
	generator kmsclient.DataKeyGenerator // nil if the service makes no data keys
	options

	mu   sync.Mutex
	errs []error
}

func (x *subject) saw(err error) {
	if err != nil {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.errs = append(x.errs, err)
	}
}

func (x *subject) Encrypt(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
	res, err := x.Service.Encrypt(ctx, uid, data)
	x.saw(err)
	if err == nil && res == nil {
		return nil, errors.New("neither an answer nor an error")
	}
	return res, err
}

func (x *subject) Decrypt(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
	data, err := x.Service.Decrypt(ctx, uid, req)
	x.saw(err)
	return data, err
}

func (x *subject) Status(ctx context.Context) (*service.StatusResponse, error) {
	res, err := x.Service.Status(ctx)
	x.saw(err)
	if err == nil && res == nil {
		return nil, errors.New("neither an answer nor an error")
	}
	return res, err
}

func (x *subject) generate(ctx context.Context) (*kmsclient.DataKey, error) {
	key, err := x.generator.GenerateDataKey(ctx, uid)
	x.saw(err)
	if err == nil && key == nil {
		return nil, errors.New("neither an answer nor an error")
	}
	return key, err
}

// wrap wraps the data and returns the request that unwraps it, which shares nothing with the
// answer.
func (x *subject) wrap(ctx context.Context, data string) (*service.DecryptRequest, error) {
	res, err := x.Encrypt(ctx, []byte(data))
	if err != nil {
		return nil, fmt.Errorf("wrap %d bytes: %w", len(data), err)
	}
	return clone(&service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations}), nil
}

// opens returns an error unless the request unwraps to want.
func (x *subject) opens(ctx context.Context, req *service.DecryptRequest, want string) error {
	got, err := x.Decrypt(ctx, clone(req))
	if err != nil {
		return fmt.Errorf("unwrap: %w", err)
	}
	if string(got) != want {
		return fmt.Errorf("unwrapped %d bytes that are not the %d that were wrapped", len(got), len(want))
	}
	return nil
}

// leaks returns an error if one that the service returned holds a recognisable part of the canary,
// in any form that texts take.
func (x *subject) leaks() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	part := canary[7:23]
	forms := []string{part, hex.EncodeToString([]byte(part)), strings.Trim(fmt.Sprintf("%d", []byte(part)), "[]")}
	for skip := range 3 { // where the part begins within base64's groups of three is not known
		inner := base64.RawStdEncoding.EncodeToString([]byte(part[skip:]))
		forms = append(forms, inner[:len(inner)-len(inner)%4])
	}
	for _, err := range x.errs {
		text := err.Error() + fmt.Sprintf("%+v", err)
		if slices.ContainsFunc(forms, func(form string) bool { return strings.Contains(text, form) }) {
			return errors.New("an error holds the plaintext")
		}
	}
	return nil
}

func clone(req *service.DecryptRequest) *service.DecryptRequest {
	return &service.DecryptRequest{Ciphertext: bytes.Clone(req.Ciphertext), KeyID: req.KeyID, Annotations: cloneMap(req.Annotations)}
}

func cloneMap(m map[string][]byte) map[string][]byte {
	if m == nil {
		return nil
	}
	c := make(map[string][]byte, len(m))
	for k, v := range m {
		c[k] = bytes.Clone(v)
	}
	return c
}

// hasReason reports whether err says why the call failed.
func hasReason(err error) bool {
	_, ok := errors.AsType[*kmsclient.Error](err)
	return ok
}

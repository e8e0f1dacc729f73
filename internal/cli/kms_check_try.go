package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// uses is what the rules use a provider for.
type uses struct {
	encrypts  bool // it generates DEK seeds
	copies    bool // it wraps recovery copies of the DEK seeds of others
	recovered bool // every rule that writes with it has a recovery key
}

// usesOf returns the uses of k. A provider in no rule is tested like one that encrypts.
func usesOf(c *config.Config, k config.KMS) uses {
	// A key file can be backed up, and a key that nothing is written with gets no new copies.
	u := uses{recovered: true}
	reads := false
	for _, r := range c.Rules {
		writes := r.WriteWith == k.Name
		u.encrypts = u.encrypts || writes
		u.copies = u.copies || slices.Contains(r.Recovery, k.Name)
		u.recovered = u.recovered && (k.Local != nil || !writes || len(r.Recovery) > 0)
		reads = reads || slices.Contains(r.ReadWith, k.Name)
	}
	u.encrypts = u.encrypts || !u.copies && !reads && k.Age == nil
	return u
}

// addFinding adds a finding.
func (r *providerReport) addFinding(format string, args ...any) {
	r.Findings = append(r.Findings, fmt.Sprintf(format, args...))
}

// explained says what an error of a KMS means, in the words of the log and of /readyz.
func explained(err error) string {
	if e, ok := errors.AsType[*kmsclient.Error](err); ok {
		return e.Explain()
	}
	return err.Error()
}

// trySeed generates a DEK seed and unwraps it, as a proxy does that encrypts with the key.
func (r *providerReport) trySeed(ctx context.Context, client *kmsclient.Client) {
	key, err := client.GenerateDataKey(ctx, newUID())
	r.addTried("generate")
	if err != nil {
		r.addFinding("generate a DEK seed: %s", explained(err))
		if r.Key != nil && r.Key.ofService {
			r.addFinding("the key was created by %q and not by an account: default keys of cloud products are for those products only; use your own key", r.Key.Creator)
		}
		return
	}
	defer clear(key.Plaintext)
	r.tryUnwrap(ctx, client, "DEK seed", key)
}

// tryCopy wraps a key that the KMS has not generated and unwraps it, as a proxy does with the DEK
// seeds of other providers. That needs another permission than to generate one.
func (r *providerReport) tryCopy(ctx context.Context, client *kmsclient.Client) {
	seed := make([]byte, 32)
	_, _ = rand.Read(seed) // never fails
	defer clear(seed)
	response, err := client.Encrypt(ctx, newUID(), bytes.Clone(seed))
	r.addTried("encrypt")
	if err != nil {
		r.addFinding("wrap a recovery copy: %s", explained(err))
		return
	}
	r.tryUnwrap(ctx, client, "recovery copy", &kmsclient.DataKey{Plaintext: seed, Ciphertext: response.Ciphertext, KeyID: response.KeyID, Annotations: response.Annotations})
}

func (r *providerReport) tryUnwrap(ctx context.Context, client *kmsclient.Client, what string, key *kmsclient.DataKey) {
	if key.KeyID != r.KeyID { // a plugin may notice a new version of the key by the call
		if again, err := client.Status(ctx); err == nil {
			r.KeyID = again.KeyID
		}
	}
	if key.KeyID != r.KeyID {
		r.addFinding("the KMS wrapped a %s under key ID %q while its status names %q", what, key.KeyID, r.KeyID)
	}
	expecting := kmsclient.Expect(ctx, sha256.Sum256(key.Plaintext))
	plaintext, err := client.Decrypt(expecting, newUID(), &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID, Annotations: key.Annotations})
	r.addTried("decrypt")
	defer clear(plaintext)
	switch {
	case errors.Is(err, kmsclient.ErrOtherSecret):
		r.addFinding("unwrap the %s: the KMS returned another key than was wrapped", what)
	case err != nil:
		r.addFinding("unwrap the %s: %s", what, explained(err))
	}
}

func (r *providerReport) addTried(op string) {
	if !slices.Contains(r.Tried, op) {
		r.Tried = append(r.Tried, op)
	}
}

// newUID identifies a call in the log of the KMS.
func newUID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return "check-" + hex.EncodeToString(b[:])
}

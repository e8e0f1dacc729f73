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

// uses is what the rules have a provider for.
type uses struct {
	seals     bool // it makes seeds
	copies    bool // it wraps and unwraps copies of others' seeds
	recovered bool // every rule that writes with it has a recovery key
}

// usesOf finds them. Of a provider in no rule, it is not known what it is meant for: it is tried as one that seals.
func usesOf(c *config.Config, k config.KMS) uses {
	// A key file is its own backup's business, and a key that nothing is written with gets no new copies.
	u := uses{recovered: true}
	reads := false
	for _, r := range c.Rules {
		writes := r.WriteWith == k.Name
		u.seals = u.seals || writes
		u.copies = u.copies || slices.Contains(r.Recovery, k.Name)
		u.recovered = u.recovered && (k.Local != nil || !writes || len(r.Recovery) > 0)
		reads = reads || slices.Contains(r.ReadWith, k.Name)
	}
	u.seals = u.seals || !u.copies && !reads
	return u
}

// found adds a finding.
func (r *providerReport) found(format string, args ...any) {
	r.Findings = append(r.Findings, fmt.Sprintf(format, args...))
}

// trySeed makes a seed and unwraps it, as a proxy does that seals with the key.
func (r *providerReport) trySeed(ctx context.Context, client *kmsclient.Client) {
	key, err := client.GenerateDataKey(ctx, newUID())
	r.tried("generate")
	if err != nil {
		r.found("make a seed: %v", err)
		if r.Key != nil && r.Key.ofService {
			r.found("the key was created by %q and not by an account: default keys of cloud products are kept for those; use a key of your own", r.Key.Creator)
		}
		return
	}
	defer clear(key.Plaintext)
	r.tryUnwrap(ctx, client, "seed", key)
}

// tryCopy wraps a key that is none of the KMS' own making and unwraps it, as a proxy does with another provider's seed: it takes another permission than to
// make one.
func (r *providerReport) tryCopy(ctx context.Context, client *kmsclient.Client) {
	seed := make([]byte, 32)
	_, _ = rand.Read(seed) // never fails
	defer clear(seed)
	answer, err := client.Encrypt(ctx, newUID(), bytes.Clone(seed))
	r.tried("encrypt")
	if err != nil {
		r.found("wrap a recovery copy: %v", err)
		return
	}
	r.tryUnwrap(ctx, client, "recovery copy", &kmsclient.DataKey{Plaintext: seed, Ciphertext: answer.Ciphertext, KeyID: answer.KeyID, Annotations: answer.Annotations})
}

func (r *providerReport) tryUnwrap(ctx context.Context, client *kmsclient.Client, what string, key *kmsclient.DataKey) {
	if key.KeyID != r.KeyID { // a plugin may learn of the key's version by the call
		if again, err := client.Status(ctx); err == nil {
			r.KeyID = again.KeyID
		}
	}
	if key.KeyID != r.KeyID {
		r.found("the KMS wrapped a %s under key ID %q while its state names %q", what, key.KeyID, r.KeyID)
	}
	expecting := kmsclient.Expect(ctx, sha256.Sum256(key.Plaintext))
	plaintext, err := client.Decrypt(expecting, newUID(), &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID, Annotations: key.Annotations})
	r.tried("decrypt")
	defer clear(plaintext)
	switch {
	case errors.Is(err, kmsclient.ErrOtherSecret):
		r.found("unwrap the %s: the KMS answered another one than was wrapped", what)
	case err != nil:
		r.found("unwrap the %s: %v", what, err)
	}
}

func (r *providerReport) tried(op string) {
	if !slices.Contains(r.Tried, op) {
		r.Tried = append(r.Tried, op)
	}
}

// newUID names a call in the KMS' log.
func newUID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return "check-" + hex.EncodeToString(b[:])
}

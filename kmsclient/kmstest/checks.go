package kmstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// The contract's limits, in bytes.
const (
	maxKeyID       = 1 << 10
	maxCiphertext  = 1 << 10
	maxAnnotations = 32 << 10
)

func roundTrips(ctx context.Context, x *subject) error {
	for _, size := range []int{1, len(canary), x.maxPlaintext} {
		data := strings.Repeat(canary, size/len(canary)+1)[:size]
		req, err := x.wrap(ctx, data)
		if err != nil {
			return err
		}
		if err := x.opens(ctx, req, data); err != nil {
			return fmt.Errorf("%d bytes: %w", size, err)
		}
	}
	return nil
}

func responseLimits(ctx context.Context, x *subject) error {
	res, err := x.Encrypt(ctx, []byte(canary))
	if err != nil {
		return err
	}
	return errors.Join(checkKeyID(res.KeyID), checkCiphertext(res.Ciphertext), checkAnnotations(res.Annotations))
}

func checkKeyID(id string) error {
	if len(id) == 0 || len(id) > maxKeyID || !utf8.ValidString(id) {
		return fmt.Errorf("a key ID of %d bytes, UTF-8: %t; want 1 to %d bytes of UTF-8", len(id), utf8.ValidString(id), maxKeyID)
	}
	return nil
}

func checkCiphertext(ciphertext []byte) error {
	if n := len(ciphertext); n == 0 || n > maxCiphertext {
		return fmt.Errorf("a ciphertext of %d bytes for a secret of %d; want 1 to %d", n, len(canary), maxCiphertext)
	}
	return nil
}

func checkAnnotations(annotations map[string][]byte) error {
	total := 0
	for name, value := range annotations {
		total += len(name) + len(value)
		if !envelope.IsAnnotationKey(name) {
			return fmt.Errorf("annotation %q is not a fully qualified domain name", name)
		}
		if bytes.Contains(value, []byte(canary)) {
			return fmt.Errorf("annotation %q holds the plaintext", name)
		}
	}
	if total > maxAnnotations {
		return fmt.Errorf("annotations of %d bytes; want at most %d", total, maxAnnotations)
	}
	return nil
}

func wrappedSecrets(ctx context.Context, x *subject) error {
	a, err := x.wrap(ctx, canary)
	if err != nil {
		return err
	}
	b, err := x.wrap(ctx, canary)
	if err != nil {
		return err
	}
	switch {
	case bytes.Equal(a.Ciphertext, []byte(canary)):
		return errors.New("the ciphertext is the plaintext")
	case bytes.Contains(a.Ciphertext, []byte(canary)):
		return errors.New("the ciphertext holds the plaintext")
	case bytes.Equal(a.Ciphertext, b.Ciphertext):
		return errors.New("the same secret was wrapped into the same ciphertext twice")
	}
	return errors.Join(x.opens(ctx, a, canary), x.opens(ctx, b, canary))
}

func statusAgrees(ctx context.Context, x *subject) error {
	s, err := x.Status(ctx)
	if err != nil {
		return err
	}
	if s.Version != "v2" && s.Version != "v2beta1" || s.Healthz != "ok" {
		return fmt.Errorf(`version %q, health %q; want "v2" or "v2beta1", and "ok"`, s.Version, s.Healthz)
	}
	res, err := x.Encrypt(ctx, []byte(canary))
	if err != nil {
		return err
	}
	if s.KeyID != res.KeyID { // a KMS may learn of the key's version by the call
		if s, err = x.Status(ctx); err != nil {
			return err
		}
	}
	if s.KeyID != res.KeyID {
		return fmt.Errorf("Status names the key %q, Encrypt %q", s.KeyID, res.KeyID)
	}
	return nil
}

func dataKeys(ctx context.Context, x *subject) error {
	if x.generator == nil {
		return nil
	}
	s, err := x.Status(ctx)
	if err != nil {
		return err
	}
	plaintexts, ciphertexts := map[string]bool{}, map[string]bool{}
	const n = 4
	for range n {
		key, err := x.generate(ctx)
		if err != nil {
			return err
		}
		if len(key.Plaintext) != 32 {
			return fmt.Errorf("a data key of %d bytes; want 32", len(key.Plaintext))
		}
		if key.KeyID != s.KeyID {
			return fmt.Errorf("a data key under %q, while Status names %q", key.KeyID, s.KeyID)
		}
		if err := errors.Join(checkCiphertext(key.Ciphertext), checkAnnotations(key.Annotations)); err != nil {
			return err
		}
		if bytes.Contains(key.Ciphertext, key.Plaintext) {
			return errors.New("the wrapped data key holds the data key")
		}
		plaintext := string(key.Plaintext)
		plaintexts[plaintext], ciphertexts[string(key.Ciphertext)] = true, true
		req := request(key)
		// The caller owns the key and will overwrite it.
		fill(key.Plaintext)
		fill(key.Ciphertext)
		if err := x.opens(ctx, req, plaintext); err != nil {
			return fmt.Errorf("data key: %w", err)
		}
	}
	if len(plaintexts) != n || len(ciphertexts) != n {
		return fmt.Errorf("%d data keys, of which %d plaintexts and %d ciphertexts are distinct", n, len(plaintexts), len(ciphertexts))
	}
	return nil
}

func damagedCiphertext(ctx context.Context, x *subject) error {
	whole, err := x.wrap(ctx, canary)
	if err != nil {
		return err
	}
	refused := func(ciphertext []byte, how string, args ...any) error {
		req := clone(whole)
		req.Ciphertext = ciphertext
		data, err := x.Decrypt(ctx, req)
		if x.garbage && err == nil && string(data) != canary {
			return nil
		}
		return x.judge(err, fmt.Sprintf(how, args...), x.mayBeDamaged)
	}
	for i := range whole.Ciphertext {
		for _, bits := range []byte{0x01, 0x80, 0xff} {
			damaged := bytes.Clone(whole.Ciphertext)
			damaged[i] ^= bits
			if err := refused(damaged, "byte %d altered by %#02x", i, bits); err != nil {
				return err
			}
		}
		if err := refused(bytes.Clone(whole.Ciphertext[:i]), "cut to %d of %d bytes", i, len(whole.Ciphertext)); err != nil {
			return err
		}
	}
	if err := refused(append(bytes.Clone(whole.Ciphertext), 'A'), "a byte appended"); err != nil {
		return err
	}
	return x.opens(ctx, whole, canary)
}

func unknownKey(ctx context.Context, x *subject) error {
	whole, err := x.wrap(ctx, canary)
	if err != nil {
		return err
	}
	for _, id := range []string{"no-such-key", whole.KeyID + "0"} {
		req := clone(whole)
		req.KeyID = id
		_, err := x.Decrypt(ctx, req)
		if err := x.judge(err, fmt.Sprintf("key ID %q", id), x.maySayNoKey); err != nil {
			return err
		}
	}
	return x.opens(ctx, whole, canary)
}

func tooLong(ctx context.Context, x *subject) error {
	data := strings.Repeat(canary, x.maxPlaintext/len(canary)+1)
	req, err := x.wrap(ctx, data)
	if err != nil {
		return nil // its text is checked with all others
	}
	return x.opens(ctx, req, data)
}

package server

import (
	"context"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// TestReloadStartsToEncrypt: a rule that only decrypted begins to encrypt without a restart, with
// the required recovery copies from the first value on.
func TestReloadStartsToEncrypt(t *testing.T) {
	d := clitest.NewDir(t)
	withDR := []string{"rules:\n", "- name: dr\n  local: {keyFile: key.yaml}\nrules:\n"}
	a, r := newRunningIn(t, d, append(withDR, "writeWith: dev", "writeWith: plaintext\n  readWith: [dev]")...)
	runRings(t, a)
	ctx, key := context.Background(), []byte("/registry/secrets/default/db")
	if stored, err := a.keys.Rules().Sealers()[0].Seal(ctx, key, []byte("v")); err != nil || string(stored) != "v" {
		t.Fatalf("before: %q, %v", stored, err)
	}
	d.Config(t, append(withDR, "writeWith: dev", "writeWith: dev\n  recovery: [dr]\n  recoveryRequired: true")...)
	r.reload("test")
	if err := r.problem(); err != nil {
		t.Fatal(err)
	}
	s := a.keys.Rules().Sealers()[0]
	stored, err := s.Seal(ctx, key, []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	if value, state, err := s.Inspect(ctx, key, stored); string(value) != "v" || state != keyring.Current || err != nil {
		t.Errorf("after: %q is %s, %v", value, state, err)
	}
}

package coordination

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// Agreement is the record of the rules that all proxies had at a time. It stands in etcd at
// FleetConfig.Prefix + "agreement", see place.go, readable, with a proof for each provider that the
// rules seal with: the SHA-256 of the policy, sealed like a value of that key. Whoever can write to
// etcd can remove the record, and cannot change it unnoticed without the KMS.
type Agreement struct {
	Policy json.RawMessage   `json:"policy"` // [Policy.Record]
	Time   time.Time         `json:"time"`
	By     string            `json:"by"` // the proxy that wrote it
	Proofs map[string][]byte `json:"proofs"`

	revision int64
}

// Errors of [Fleet.Verify].
var (
	// ErrForged says that a record does not come from a proxy with the KMS' keys, or that the keys
	// are not those of the record.
	ErrForged = errors.New("the record of the rules that the proxies agreed on is not genuine, or was sealed with other keys than these")
	// ErrUnverified says that no KMS answers that could tell.
	ErrUnverified = errors.New("the record of the rules that the proxies agreed on could not be checked yet")
)

func (f *Fleet) key() string { return agreementKey(f.cfg.Prefix) }

func agreementKey(prefix string) string { return prefix + "agreement" }

// Agreement reads the record. It is nil if there is none. One that cannot be decoded is
// [ErrForged].
func (f *Fleet) Agreement(ctx context.Context, opts ...clientv3.OpOption) (*Agreement, error) {
	return readAgreement(ctx, f.cfg.Client, f.cfg.Prefix, opts...)
}

// Revision returns etcd's revision as the member that is asked has it.
func (f *Fleet) Revision(ctx context.Context) (int64, error) {
	r, err := f.cfg.Client.Get(ctx, f.key(), clientv3.WithCountOnly(), clientv3.WithSerializable())
	if err != nil {
		return 0, err
	}
	return r.Header.Revision, nil
}

func readAgreement(ctx context.Context, kv clientv3.KV, prefix string, opts ...clientv3.OpOption) (*Agreement, error) {
	r, err := kv.Get(ctx, agreementKey(prefix), opts...)
	if err != nil {
		return nil, fmt.Errorf("read the rules that the proxies agreed on: %w", err)
	}
	if len(r.Kvs) == 0 {
		return nil, nil
	}
	a := &Agreement{revision: r.Kvs[0].ModRevision}
	if err := json.Unmarshal(r.Kvs[0].Value, a); err != nil {
		return a, fmt.Errorf("%w: it is not JSON", ErrForged)
	}
	return a, nil
}

// Check tells whether a record is genuine, by the proofs of providers, those that its rules seal
// with. A provider that this proxy does not have proves nothing, nor does one whose KMS does not
// answer or whose key may not be used: if none is left, the error is [ErrUnverified]. old reports a
// proof that should be made anew.
func (f *Fleet) Verify(ctx context.Context, a *Agreement, providers []string) (old bool, err error) {
	if len(providers) == 0 {
		return false, nil // rules that seal nothing protect nothing
	}
	sum := sha256.Sum256(a.Policy)
	proven := false
	for _, name := range providers {
		prover := f.cfg.Provers[name]
		if prover == nil {
			continue
		}
		proof := a.Proofs[name]
		if len(proof) == 0 {
			return false, fmt.Errorf("%w: it has no proof by KMS provider %q", ErrForged, name)
		}
		plaintext, standing, err := prover.Inspect(ctx, []byte(f.key()), proof)
		if e, ok := errors.AsType[*keyring.Error](err); ok && e.Kind != keyring.Corrupt {
			continue
		}
		if err != nil || standing != keyring.Current && standing != keyring.Stale || !bytes.Equal(plaintext, sum[:]) {
			return false, fmt.Errorf("%w: the proof by KMS provider %q does not hold", ErrForged, name)
		}
		proven, old = true, old || standing == keyring.Stale
	}
	if !proven {
		return false, ErrUnverified
	}
	return old, nil
}

// agree records policy unless it is on record, where proxies look for it and nowhere else.
func (f *Fleet) agree(ctx context.Context, policy []byte, providers []string) error {
	if err := f.note(ctx, policy, providers); err != nil {
		return err
	}
	if err := f.point(ctx); err != nil {
		return err
	}
	return f.forgetOthers(ctx)
}

func (f *Fleet) note(ctx context.Context, policy []byte, providers []string) error {
	was, err := f.Agreement(ctx)
	if err != nil && !errors.Is(err, ErrForged) {
		return err
	}
	if err == nil && was != nil && bytes.Equal(was.Policy, policy) {
		if old, err := f.Verify(ctx, was, providers); !old && !errors.Is(err, ErrForged) {
			return nil
		}
	}
	sum := sha256.Sum256(policy)
	next := Agreement{Policy: policy, Time: time.Now().UTC(), By: f.cfg.Self.ID, Proofs: make(map[string][]byte)}
	for _, name := range providers {
		prover := f.cfg.Provers[name]
		if prover == nil {
			return fmt.Errorf("record the rules: no KMS provider %q is running", name)
		}
		proof, err := prover.Seal(ctx, []byte(f.key()), sum[:])
		if err != nil {
			return fmt.Errorf("record the rules: %w", err)
		}
		next.Proofs[name] = proof
	}
	value, err := json.Marshal(next)
	if err != nil {
		return err
	}
	at := int64(0)
	if was != nil {
		at = was.revision
	}
	// If another proxy was faster, its record is looked at when it shows.
	_, err = f.cfg.Client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(f.key()), "=", at)).Then(clientv3.OpPut(f.key(), string(value))).Commit()
	if err != nil {
		return fmt.Errorf("record the rules: %w", err)
	}
	return nil
}

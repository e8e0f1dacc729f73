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

// Agreement is the record of the rules that all proxies had at one time. It is stored in plaintext
// in etcd, at FleetConfig.Prefix + "agreement" (see location.go), with a proof for each provider
// that the rules write with: the SHA-256 of the policy, encrypted like a value of that key. A
// client that can write to etcd can remove the record, but cannot change it unnoticed without the
// KMS.
type Agreement struct {
	Policy json.RawMessage   `json:"policy"` // [Policy.Record]
	Time   time.Time         `json:"time"`
	By     string            `json:"by"` // the proxy that wrote it
	Proofs map[string][]byte `json:"proofs"`

	revision int64
}

// Errors of [Fleet.Verify].
var (
	// ErrForged is returned for a record that was not written by a proxy with the keys of the KMS,
	// or whose proofs were encrypted with other keys than this proxy has.
	ErrForged = errors.New("the record of the rules that the proxies agreed on is not genuine, or was made with other keys than these")
	// ErrUnverified is returned if no KMS is available to verify the record.
	ErrUnverified = errors.New("the record of the rules that the proxies agreed on could not be checked yet")
)

func (f *Fleet) key() string { return agreementKey(f.cfg.Prefix) }

func agreementKey(prefix string) string { return prefix + "agreement" }

// Agreement reads the record. It returns nil if there is none, and [ErrForged] if it cannot be
// decoded.
func (f *Fleet) Agreement(ctx context.Context, opts ...clientv3.OpOption) (*Agreement, error) {
	return readAgreement(ctx, f.cfg.Client, f.cfg.Prefix, opts...)
}

// Revision returns the revision of the etcd member that answers, which may lag behind the leader.
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

// Verify checks the proofs of a record by the given providers, those that its rules write with. A
// provider is skipped if this proxy does not have it, if its KMS does not respond, or if its key
// cannot be used. If all are skipped, the error is [ErrUnverified]. stale reports that a proof was
// made with an outdated key and should be renewed.
func (f *Fleet) Verify(ctx context.Context, a *Agreement, providers []string) (stale bool, err error) {
	if len(providers) == 0 {
		return false, nil // rules that encrypt nothing protect nothing
	}
	sum := sha256.Sum256(a.Policy)
	verified := false
	for _, name := range providers {
		sealer := f.cfg.ProofSealers[name]
		if sealer == nil {
			continue
		}
		proof := a.Proofs[name]
		if len(proof) == 0 {
			return false, fmt.Errorf("%w: it has no proof by KMS provider %q", ErrForged, name)
		}
		plaintext, state, err := sealer.Inspect(ctx, []byte(f.key()), proof)
		if e, ok := errors.AsType[*keyring.Error](err); ok && e.Kind != keyring.Corrupt {
			continue
		}
		if err != nil || state != keyring.Current && state != keyring.Stale || !bytes.Equal(plaintext, sum[:]) {
			return false, fmt.Errorf("%w: the proof by KMS provider %q does not hold", ErrForged, name)
		}
		verified, stale = true, stale || state == keyring.Stale
	}
	if !verified {
		return false, ErrUnverified
	}
	return stale, nil
}

// recordAgreement records the policy unless it is recorded already, at the place where proxies
// search for it and nowhere else.
func (f *Fleet) recordAgreement(ctx context.Context, policy []byte, providers []string) error {
	if err := f.writeRecord(ctx, policy, providers); err != nil {
		return err
	}
	if err := f.writePointer(ctx); err != nil {
		return err
	}
	return f.deleteObsoleteRecords(ctx)
}

func (f *Fleet) writeRecord(ctx context.Context, policy []byte, providers []string) error {
	was, err := f.Agreement(ctx)
	if err != nil && !errors.Is(err, ErrForged) {
		return err
	}
	if err == nil && was != nil && bytes.Equal(was.Policy, policy) {
		if stale, err := f.Verify(ctx, was, providers); !stale && !errors.Is(err, ErrForged) {
			return nil
		}
	}
	sum := sha256.Sum256(policy)
	next := Agreement{Policy: policy, Time: time.Now().UTC(), By: f.cfg.Self.ID, Proofs: make(map[string][]byte)}
	for _, name := range providers {
		sealer := f.cfg.ProofSealers[name]
		if sealer == nil {
			return fmt.Errorf("record the rules: no KMS provider %q is running", name)
		}
		proof, err := sealer.Seal(ctx, []byte(f.key()), sum[:])
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
	// If another proxy was faster, the watch reports its record, and reconcile reads it.
	_, err = f.cfg.Client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(f.key()), "=", at)).Then(clientv3.OpPut(f.key(), string(value))).Commit()
	if err != nil {
		return fmt.Errorf("record the rules: %w", err)
	}
	return nil
}

package provider

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/age"
)

// ErrWrapsOnly is returned where a provider of kind age cannot be used.
var ErrWrapsOnly = errors.New("is of kind age, which only wraps recovery copies and has no key management service")

// recipientHint is the hint for what is no recipient.
const recipientHint = "write a recipient as age-keygen prints it, age1… or age1pq1…"

// maxRecipientsFile bounds a recipients file, in bytes.
const maxRecipientsFile = 1 << 20

// AgeKey wraps recovery copies for the age recipients of the configuration. It unwraps them if it
// was given identities. It is safe for concurrent use.
type AgeKey struct {
	config     *config.Age
	identities *age.Identities // nil unless SetIdentities was called
	recipients atomic.Pointer[age.Recipients]
}

var _ keyring.OfflineKey = (*AgeKey)(nil)

func newAgeKey(c *config.Age) (*AgeKey, error) {
	k := &AgeKey{config: c}
	if err := k.Reload(); err != nil {
		return nil, err
	}
	return k, nil
}

// ageRecipients returns the recipients of c and those in its file.
func ageRecipients(c *config.Age) (*age.Recipients, error) {
	all := c.Recipients
	if c.RecipientsFile != "" {
		text, err := readRecipients(c.RecipientsFile)
		if err != nil {
			return nil, problem.In("recipientsFile", "put one recipient on each line, as age-keygen prints it", err)
		}
		all = append(all[:len(all):len(all)], text...)
	}
	recipients, err := age.NewRecipients(all)
	if err == nil {
		return recipients, nil
	}
	e, ok := errors.AsType[*age.RecipientError](err)
	switch n := len(c.Recipients); {
	case errors.Is(err, age.ErrMixed):
		return nil, problem.New("use recipients of one kind, and a second provider for those of the other", "%w", err)
	case !ok:
		return nil, err
	case e.Index >= n: // readRecipients has parsed it, so that it is there twice
		return nil, problem.In("recipientsFile", "remove one of them", fmt.Errorf("%s: its recipient %d is there twice, or is in recipients too", c.RecipientsFile, e.Index-n+1))
	default:
		return nil, problem.In(fmt.Sprintf("recipients[%d]", e.Index), recipientHint, err)
	}
}

// readRecipients reads a recipients file. It names the line that is wrong.
func readRecipients(name string) ([]string, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxRecipientsFile {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", name, maxRecipientsFile)
	}
	text, err := os.ReadFile(name) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, err
	}
	defer clear(text) // it may be an identity file by mistake
	recipients, err := age.ReadRecipients(text)
	if e, ok := errors.AsType[*age.RecipientError](err); ok {
		return nil, fmt.Errorf("%s: line %d %s", name, e.Index+1, e.Text)
	}
	if err == nil && len(recipients) == 0 {
		err = fmt.Errorf("%s has no recipient", name)
	}
	return recipients, err
}

// SetIdentities lets the key unwrap copies. It must be called before the key is used.
func (k *AgeKey) SetIdentities(ids *age.Identities) { k.identities = ids }

// Reload reads the recipients file again. On an error, the old recipients stay in use.
func (k *AgeKey) Reload() error {
	recipients, err := ageRecipients(k.config)
	if err == nil {
		k.recipients.Store(recipients)
	}
	return err
}

// Recipients returns the recipients in use.
func (k *AgeKey) Recipients() *age.Recipients { return k.recipients.Load() }

// ID implements [keyring.OfflineKey].
func (k *AgeKey) ID() string { return k.Recipients().ID() }

// Wrap implements [keyring.OfflineKey].
func (k *AgeKey) Wrap(seed []byte) (file []byte, id string, err error) {
	r := k.Recipients()
	file, err = r.Wrap(seed)
	return file, r.ID(), err
}

// CanUnwrap implements [keyring.OfflineKey].
func (k *AgeKey) CanUnwrap() bool { return k.identities != nil }

// Unwrap implements [keyring.OfflineKey].
func (k *AgeKey) Unwrap(file []byte) ([]byte, error) { return k.identities.Unwrap(file) }

// Test wraps a random seed for the recipients and checks the structure of the result. If the key
// has identities, it unwraps the result with them; tested says so.
func (k *AgeKey) Test() (tested bool, err error) {
	seed := make([]byte, age.SeedSize)
	_, _ = rand.Read(seed) // never fails
	file, _, err := k.Wrap(seed)
	if err == nil {
		err = age.CheckWrapped(file)
	}
	if err != nil {
		return false, fmt.Errorf("wrap a recovery copy: %w", err)
	}
	if !k.CanUnwrap() {
		return false, nil
	}
	got, err := k.Unwrap(file)
	defer clear(got)
	if err == nil && !bytes.Equal(got, seed) {
		err = errors.New("the identity returned another key than was wrapped")
	}
	if err != nil {
		return false, fmt.Errorf("unwrap the recovery copy: %w", err)
	}
	return true, nil
}

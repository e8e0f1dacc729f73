// Package age wraps DEK seeds for people instead of a KMS: for age recipients, of which the proxy
// has only the public keys. The proxy can wrap a seed and never unwrap it. The private keys (age
// identities) stay offline, and the commands for emergencies take them from a file.
//
// A wrapped seed is exactly an age file, as https://age-encryption.org/v1 specifies it, so that any
// implementation of age decrypts it without this software.
package age

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"

	"filippo.io/age"
	"filippo.io/age/plugin"
	"filippo.io/age/tag"
)

// SeedSize is the size of a DEK seed in bytes.
const SeedSize = 32

// payloadSize is the size of an age file behind its header: a nonce, and one chunk of
// ChaCha20-Poly1305.
const payloadSize = 16 + SeedSize + 16

// maxWrapped is the largest age file that Wrap makes, in bytes. Every value in etcd carries a copy
// of it, and etcd and Kubernetes limit the size of a value.
const maxWrapped = 8 << 10

// Recipients are public keys to wrap for. Any one of their identities unwraps. They are immutable
// and safe for concurrent use.
type Recipients struct {
	all   []age.Recipient
	names []string // as they were given
	id    string
}

// ErrMixed reports recipients of which some are post-quantum and some are not: the others would
// weaken those, and age refuses it.
var ErrMixed = errors.New("post-quantum recipients (age1pq1…, age1tagpq1…) and others cannot be used together")

// RecipientError says which recipient is not usable. It never holds the recipient's text, which may
// be a private key in the wrong place.
type RecipientError struct {
	Index int // in the list, from 0
	Text  string
}

// Error implements error.
func (e *RecipientError) Error() string { return e.Text }

// NewRecipients parses recipients: age1… (X25519), age1pq1… (hybrid with ML-KEM-768), and age1tag1…
// and age1tagpq1… (P-256 in hardware). Recipients that need a plugin to wrap are refused, since the
// proxy starts no other programs. Errors about one recipient are [*RecipientError].
func NewRecipients(texts []string) (*Recipients, error) {
	if len(texts) == 0 {
		return nil, errors.New("there is no recipient")
	}
	r := &Recipients{}
	for i, text := range texts {
		recipient, err := parseRecipient(text)
		if err != nil {
			return nil, &RecipientError{Index: i, Text: err.Error()}
		}
		if at := slices.Index(r.names, text); at >= 0 {
			return nil, &RecipientError{Index: i, Text: fmt.Sprintf("is the same as recipient %d", at)}
		}
		r.all, r.names = append(r.all, recipient), append(r.names, text)
	}
	sorted := slices.Clone(r.names)
	slices.Sort(sorted)
	sum := sha256.Sum256([]byte(strings.Join(sorted, "\n")))
	r.id = "age-" + hex.EncodeToString(sum[:8])
	// age reports recipients that do not go together when it wraps, which is too late.
	wrapped, err := r.Wrap(make([]byte, SeedSize))
	if err != nil {
		return nil, err
	}
	if len(wrapped) > maxWrapped {
		return nil, fmt.Errorf("a copy for %d recipients takes %d bytes of every value, and may take %d: use fewer", len(r.all), len(wrapped), maxWrapped)
	}
	return r, nil
}

// ReadRecipients reads a recipients file: one recipient on each line. Empty lines and lines that
// begin with # are ignored. Index in a [*RecipientError] is then the number of the line, from 0.
func ReadRecipients(file []byte) ([]string, error) {
	var texts []string
	for i, line := range lines(file) {
		if _, err := parseRecipient(line); err != nil {
			return nil, &RecipientError{Index: i, Text: err.Error()}
		}
		texts = append(texts, line)
	}
	return texts, nil
}

// lines yields the lines of a file with their numbers, from 0, but no empty lines and comments.
func lines(file []byte) iter.Seq2[int, string] {
	return func(yield func(int, string) bool) {
		for i, line := range strings.Split(string(file), "\n") {
			line = strings.TrimSuffix(line, "\r")
			if line != "" && !strings.HasPrefix(line, "#") && !yield(i, line) {
				return
			}
		}
	}
}

// parseRecipient parses one recipient. Its errors never quote the text.
func parseRecipient(text string) (age.Recipient, error) {
	switch {
	case strings.HasPrefix(text, "AGE-SECRET-KEY-"), strings.HasPrefix(text, "AGE-PLUGIN-"):
		return nil, errors.New("is an identity, which is secret; a recipient begins with age1, and age-keygen -y prints it")
	case !strings.HasPrefix(text, "age1"):
		return nil, errors.New("is not an age recipient, which begins with age1")
	}
	name, _, err := plugin.ParseRecipient(text)
	if err == nil {
		switch name {
		case "pq":
			r, err := age.ParseHybridRecipient(text)
			if err != nil {
				return nil, errors.New("is not a valid age1pq1 recipient; copy it again, as a whole")
			}
			return r, nil
		case "tag", "tagpq":
			r, err := tag.ParseRecipient(text)
			if err != nil {
				return nil, fmt.Errorf("is not a valid age1%s1 recipient; copy it again, as a whole", name)
			}
			return r, nil
		}
		return nil, fmt.Errorf("needs the program age-plugin-%s to wrap, and the proxy starts no programs; use an age1tag1 recipient of the same token if it has one", name)
	}
	r, err := age.ParseX25519Recipient(text)
	if err != nil {
		return nil, errors.New("is not a valid age recipient; copy it again, as a whole")
	}
	return r, nil
}

// ID names the set of recipients: the same for the same recipients in any order. It is stored in
// each value, so that a change of the recipients can be seen.
func (r *Recipients) ID() string { return r.id }

// Names returns the recipients as they were given. They are public.
func (r *Recipients) Names() []string { return slices.Clone(r.names) }

// Wrap encrypts a DEK seed for the recipients and returns an age file. It does not retain seed.
func (r *Recipients) Wrap(seed []byte) ([]byte, error) {
	if len(seed) != SeedSize {
		return nil, fmt.Errorf("a DEK seed has %d bytes, not %d", SeedSize, len(seed))
	}
	var file bytes.Buffer
	w, err := age.Encrypt(&file, r.all...)
	if err != nil {
		// The one reason that valid recipients can give.
		return nil, fmt.Errorf("wrap for age recipients: %w", ErrMixed)
	}
	_, err = w.Write(seed)
	if err = cmp.Or(err, w.Close()); err != nil {
		return nil, errors.New("wrap for age recipients: encryption failed")
	}
	if err := CheckWrapped(file.Bytes()); err != nil {
		return nil, fmt.Errorf("wrap for age recipients: %w", err)
	}
	return file.Bytes(), nil
}

// isWrapped reports whether bytes are an age file, by its first line.
func isWrapped(b []byte) bool { return bytes.HasPrefix(b, []byte("age-encryption.org/v1\n")) }

// CheckWrapped checks an age file as far as that is possible without an identity: that its header
// is one, and that what follows has the size of an encrypted DEK seed.
func CheckWrapped(file []byte) error {
	r := bytes.NewReader(file)
	header, err := age.ExtractHeader(r)
	if err != nil {
		return errors.New("the recovery copy is not an age file")
	}
	if n := len(file) - len(header); n != payloadSize {
		return fmt.Errorf("the recovery copy is an age file with %d bytes behind its header, not the %d of a DEK seed", n, payloadSize)
	}
	return nil
}

// readSeed reads a DEK seed and nothing else.
func readSeed(r io.Reader) ([]byte, error) {
	seed := make([]byte, SeedSize+1)
	switch n, err := io.ReadFull(r, seed); {
	case errors.Is(err, io.ErrUnexpectedEOF) && n == SeedSize:
		return seed[:SeedSize:SeedSize], nil
	case err == nil:
		clear(seed)
		return nil, errors.New("the age file holds more than a DEK seed")
	default:
		clear(seed)
		return nil, errors.New("the age file is damaged")
	}
}

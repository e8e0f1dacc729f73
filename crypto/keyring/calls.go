package keyring

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// caller calls the KMS of a ring. close cancels the running calls, and waits for them.
type caller struct {
	p *provider

	// base is the context of unwraps, which no single caller owns; stop ends it.
	base    context.Context
	stop    context.CancelCauseFunc
	running sync.WaitGroup

	unwrapped atomic.Int64 // when the KMS last unwrapped a seed, in Unix nanoseconds; 0 before

	mu sync.Mutex
	// since when the KMS denies to decrypt under a key, see provider.keyOf
	denied map[string]time.Time
}

// maxDenied limits how many keys that stored values name are kept in caller.denied.
const maxDenied = 64

var errStopped = errors.New("key ring has stopped")

// begin registers a call, unless the ring has stopped. The caller ends it with running.Done.
func (c *caller) begin() bool {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	if c.p.stopped {
		return false
	}
	c.running.Add(1)
	return true
}

// close cancels the running calls, waits for them, and ends every wait for a health check.
func (c *caller) close() {
	c.p.mu.Lock()
	c.p.stopped = true
	c.p.mu.Unlock()
	c.stop(errStopped)
	c.p.endCheck(func(st *state) {
		if st.err == nil && !st.healthy {
			st.err = errStopped
		}
	})
	c.running.Wait()
}

// status returns the KMS' Status, which has a valid key ID.
func (c *caller) status(ctx context.Context) (*service.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, c.p.cfg.Timeout)
	defer cancel()
	status, err := c.p.cfg.KMS.Status(ctx)
	switch {
	case err != nil:
		return nil, fmt.Errorf("get the key's status: %w", err)
	case status == nil || status.KeyID == "" || len(status.KeyID) > envelope.MaxKeyID:
		return nil, brokenContract("Status", "the key ID is empty or too long")
	case status.Healthz != "ok":
		return nil, &kmsclient.Error{Op: "Status", Provider: c.p.cfg.Provider, Reason: kmsclient.Unhealthy, KeyID: status.KeyID, Detail: "health is not ok"}
	}
	return status, nil
}

// dataKey has the KMS make a data key, or makes one and has it wrapped.
func (c *caller) dataKey(ctx context.Context) (*kmsclient.DataKey, error) {
	ctx, cancel := context.WithTimeout(ctx, c.p.cfg.Timeout)
	defer cancel()
	uid := rand.Text()
	if g, ok := c.p.cfg.KMS.(kmsclient.DataKeyGenerator); ok {
		k, err := g.GenerateDataKey(ctx, uid)
		if err == nil && k == nil {
			err = brokenContract("GenerateDataKey", "the response is empty")
		}
		return k, err
	}
	return kmsclient.WrapNewKey(ctx, c.p.cfg.KMS, uid)
}

// wrapCopy has this ring's KMS wrap another ring's seed, and returns the annotations that hold the
// copy. It does not call a KMS whose last health check failed, since writes of the other ring wait
// for the result.
func (c *caller) wrapCopy(ctx context.Context, seed []byte) (copyID, map[string][]byte, error) {
	if c.p.cfg.Offline != nil {
		return c.wrapOffline(seed)
	}
	st := c.p.state.Load()
	if err := st.kmsError(); err != nil {
		return copyID{}, nil, err
	}
	if !c.begin() {
		return copyID{}, nil, errStopped
	}
	defer c.running.Done()
	ctx, cancel := context.WithTimeout(ctx, c.p.cfg.Timeout)
	defer cancel()
	defer context.AfterFunc(c.base, cancel)()
	response, err := c.p.cfg.KMS.Encrypt(ctx, rand.Text(), bytes.Clone(seed))
	switch {
	case err != nil:
		if refuses(err) {
			c.p.suspect()
		}
		return copyID{}, nil, fmt.Errorf("wrap recovery copy: %w", err)
	case response == nil:
		return copyID{}, nil, brokenContract("Encrypt", "the response is empty")
	case bytes.Contains(response.Ciphertext, seed):
		return copyID{}, nil, brokenContract("Encrypt", "the wrapped data key holds the data key itself")
	}
	wrapped := envelope.Copy{KeyID: response.KeyID, Source: response.Ciphertext, Annotations: response.Annotations}
	encoded, err := wrapped.Append(nil)
	if err != nil {
		return copyID{}, nil, brokenContract("Encrypt", err.Error())
	}
	id := copyID{provider: c.p.cfg.Provider, keyID: wrapped.KeyID, statusID: cmp.Or(st.keyID, wrapped.KeyID)}
	return id, map[string][]byte{c.p.copyName: encoded}, nil
}

// unwrap has the KMS unwrap the seed in a header.
func (c *caller) unwrap(ctx context.Context, h *envelope.Header) ([]byte, error) {
	if !c.begin() {
		return nil, errStopped
	}
	defer c.running.Done()
	if c.p.cfg.Offline != nil {
		return c.unwrapOffline(h)
	}
	ctx, cancel := context.WithTimeout(ctx, c.p.cfg.Timeout)
	defer cancel()
	plain, err := c.p.cfg.KMS.Decrypt(ctx, rand.Text(), &service.DecryptRequest{Ciphertext: h.Source, KeyID: h.KeyID, Annotations: h.KMSAnnotations()})
	if err == nil && len(plain) == 0 {
		err = brokenContract("Decrypt", "the response is empty")
	}
	if err != nil {
		return nil, err
	}
	c.unwrapped.Store(time.Now().UnixNano())
	c.mu.Lock()
	delete(c.denied, c.p.keyOf(h.KeyID))
	c.mu.Unlock()
	return plain, nil
}

// deniedFor records that the KMS denies a key and returns how long it has done so. Of keys without
// cached seeds it records maxDenied at most, since stored values can name any number of them.
func (c *caller) deniedFor(key string, cached bool) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	since, ok := c.denied[key]
	if !ok {
		if cached || len(c.denied) < maxDenied {
			c.denied[key] = time.Now()
		}
		return 0
	}
	return time.Since(since)
}

// keepDenials forgets the denials of all keys but those that keep accepts.
func (c *caller) keepDenials(keep func(key string) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.denied, func(key string, _ time.Time) bool { return !keep(key) })
}

// unwrapsOthers reports whether the KMS has unwrapped a seed since a time, and within the last two
// poll intervals. A ring that only reads may have no seed to unwrap at each poll.
func (c *caller) unwrapsOthers(since time.Time) bool {
	last := time.Unix(0, c.unwrapped.Load())
	return last.After(since) && time.Since(last) <= 2*max(c.p.cfg.PollInterval, c.p.cfg.FailingPollInterval)
}

package kmstest

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// Persona is a plugin with the [Personality] of a real one, before a vendor's KMS that the test
// controls. It counts what it is called for and what it calls the vendor for, so that a test need
// not measure time. It is safe for concurrent use.
type Persona struct {
	p      Personality
	vendor *Memory

	mu        sync.Mutex
	versions  map[string]string // the vendor's key ID of each of the plugin's
	order     []string          // the plugin's key IDs, the current one last
	started   string            // the key ID that was the current one at the start of the process
	named     bool              // a call has passed the key's version to the process
	outage    bool
	disabled  map[string]bool
	failed    time.Time // the last Encrypt or Decrypt that failed
	calls     map[string]int
	refused   int // Decrypts that did not give back what was encrypted
	vendorHad int
	slow      time.Duration // of a Decrypt that is refused
}

var _ kmsclient.Service = (*Persona)(nil)

// NewPersona returns a plugin with one key version.
func NewPersona(p Personality) *Persona {
	s := &Persona{p: p, vendor: NewMemory(), versions: map[string]string{}, disabled: map[string]bool{}, calls: map[string]int{}}
	s.add("memory/1")
	s.started = s.order[0]
	return s
}

func (s *Persona) add(vendorID string) {
	id := s.p.keyID(len(s.order) + 1)
	s.versions[id], s.order = vendorID, append(s.order, id)
}

// Rotate makes a new key version at the vendor, and returns its key ID. A plugin that serves one
// version of a key is started again for it, as its operator would.
func (s *Persona) Rotate() string {
	vendorID := s.vendor.Rotate()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(vendorID)
	if s.p.OneVersion {
		s.started = s.order[len(s.order)-1]
	}
	return s.order[len(s.order)-1]
}

// Restart starts the plugin's process again: what it knew is forgotten.
func (s *Persona) Restart() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.named, s.failed, s.started = false, time.Time{}, s.order[len(s.order)-1]
}

// SetOutage has the vendor fail every call, or no longer.
func (s *Persona) SetOutage(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.outage = on
}

// Disable has the vendor refuse a key ID.
func (s *Persona) Disable(keyID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disabled[keyID] = true
}

// SetSlowRefusals has the plugin try a refused Decrypt for so long itself before it says so.
func (s *Persona) SetSlowRefusals(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slow = d
}

// Calls returns how often an operation was called.
func (s *Persona) Calls(op string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[op]
}

// Refused returns how many Decrypts did not give back what was encrypted: they failed, or their
// response was garbage.
func (s *Persona) Refused() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused
}

// VendorCalls returns how often the vendor was called.
func (s *Persona) VendorCalls() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vendorHad
}

// errUnknown is how the plugins fail: k8s.io/kms makes gRPC's code Unknown of it.
func errUnknown(op, keyID string) error {
	return &kmsclient.Error{Op: op, Reason: kmsclient.Failing, Code: "Unknown", KeyID: keyID, Detail: "see the plugin's own log"}
}

// call counts a call, and what it costs at the vendor.
func (s *Persona) call(op string, vendor int) {
	s.calls[op]++
	s.vendorHad += vendor
}

// Encrypt implements [kmsclient.Service].
func (s *Persona) Encrypt(ctx context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.call(opEncrypt, 1)
	id := s.order[len(s.order)-1]
	if s.p.OneVersion {
		id = s.started
	}
	if s.outage || s.disabled[id] {
		s.failed = time.Now()
		return nil, errUnknown(opEncrypt, "")
	}
	s.named = true
	res, err := s.vendor.under(ctx, s.versions[id], data)
	if err != nil {
		return nil, err
	}
	return &service.EncryptResponse{Ciphertext: append(res, make([]byte, s.p.pad)...), KeyID: id, Annotations: cloneMap(s.p.annotations)}, nil
}

// Decrypt implements [kmsclient.Service].
func (s *Persona) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.call(opDecrypt, 1)
	vendorID, known := s.versions[req.KeyID]
	out := s.outage || s.disabled[req.KeyID] || s.p.OneVersion && req.KeyID != s.started
	broken := s.p.Garbage && known && !out
	slow := s.slow
	s.mu.Unlock()
	var data []byte
	err := errUnknown(opDecrypt, req.KeyID)
	if known && !out && len(req.Ciphertext) > s.p.pad && s.hasAnnotations(req) {
		data, err = s.vendor.Decrypt(ctx, uid, &service.DecryptRequest{
			Ciphertext: req.Ciphertext[:len(req.Ciphertext)-s.p.pad], KeyID: vendorID, Annotations: map[string][]byte{memoryAnnotation: []byte(vendorID)},
		})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.failed = time.Now()
		s.refused++
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case broken && len(req.Ciphertext) < 16:
			panic("slice bounds out of range")
		case broken:
			return bytes.Repeat([]byte{0x5a}, 32), nil
		case slow > 0:
			s.mu.Unlock()
			select {
			case <-time.After(slow):
			case <-ctx.Done():
				err = ctx.Err()
			}
			s.mu.Lock()
			if errors.Is(err, ctx.Err()) && ctx.Err() != nil {
				return nil, err
			}
		}
		return nil, errUnknown(opDecrypt, req.KeyID)
	}
	s.named = true
	return data[:max(len(data)-s.p.lose, 0)], nil
}

// hasAnnotations reports whether the annotations that were given came back.
func (s *Persona) hasAnnotations(req *service.DecryptRequest) bool {
	for k, v := range s.p.annotations {
		if got, ok := req.Annotations[k]; !ok || !bytes.Equal(got, v) {
			return false
		}
	}
	return true
}

// Status implements [kmsclient.Service].
func (s *Persona) Status(ctx context.Context) (*service.StatusResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id := s.order[len(s.order)-1]
	if s.p.OneVersion {
		id = s.started
	}
	res := &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: id}
	if s.p.beta {
		res.Version = "v2beta1"
	}
	if s.p.statusKeyID != nil && !s.named {
		res.KeyID = s.p.statusKeyID(0)
	}
	if s.p.unhealthyFor > 0 && time.Since(s.failed) < s.p.unhealthyFor {
		s.call(opStatus, 0)
		res.Healthz = "err"
		return res, nil
	}
	if !s.outage || s.p.statusCalls == 0 {
		s.call(opStatus, s.p.statusCalls)
		s.named = s.named || s.p.statusCalls > 0
		return res, nil
	}
	s.call(opStatus, s.p.failingCalls)
	switch {
	case s.p.unhealthyFor > 0:
		s.failed = time.Now()
		res.Healthz = "err"
		return res, nil
	case s.p.ignoresDeadline:
		s.mu.Unlock()
		time.Sleep(2 * time.Second) // five tries, whatever the caller's deadline is
		s.mu.Lock()
	}
	return nil, errUnknown(opStatus, "")
}

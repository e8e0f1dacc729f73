package interop

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

const provider = "ack"

var secretKey = []byte("/registry/secrets/default/s1")

// sample is an etcd key and a value for it.
type sample struct {
	name  string
	key   []byte
	value []byte
}

func samples() []sample {
	random := make([]byte, 1<<20)
	rand.Read(random)
	return []sample{
		{"empty", secretKey, nil},
		{"one byte", secretKey, []byte{0}},
		{"secret", secretKey, []byte("k8s\x00\n\x0c\n\x02v1\x12\x06Secret\x12\x20...")},
		{"json", []byte("/registry/example.com/widgets/ns/w"), []byte(`{"apiVersion":"example.com/v1","kind":"Widget"}`)},
		{"10 KiB", secretKey, random[:10<<10]},
		{"1 MiB", secretKey, random},
		{"sealed before", secretKey, []byte("k8s:enc:kms:v2:ack:\x0a\x01x")},
		{"one-byte key", []byte{0}, []byte("v")},
		{"binary key", []byte("/a\x00\xff/\xc3\x28"), []byte("v")},
		{"long key", []byte("/registry/" + strings.Repeat("k", 4096)), []byte("v")},
	}
}

// TestExchange has each side read what the other wrote, with cached DEK seeds and without. A
// process that has just started must have the plugin unwrap them.
func TestExchange(t *testing.T) {
	for _, annotated := range []bool{false, true} {
		t.Run(fmt.Sprintf("annotations=%v", annotated), func(t *testing.T) {
			p := startPlugin(t, "key-1/version-1")
			if annotated {
				p.annotate = map[string][]byte{"version.example.com": []byte("1"), "empty.example.com": {}, "binary.example.com": {0, 0xff}}
			}
			we := newOurs(t, p, provider)
			they := newKube(t, p, provider, envelope.TypeSeed)
			before := newKube(t, p, provider, envelope.TypeKey)
			for _, s := range samples() {
				t.Run(s.name, func(t *testing.T) {
					for _, w := range []struct {
						writer string
						typ    envelope.Type
						stored []byte
					}{
						{"ours", envelope.TypeSeed, we.seal(t, s.key, s.value)},
						{"kube-apiserver, seed", envelope.TypeSeed, they.seal(t, s.key, s.value)},
						{"kube-apiserver, key", envelope.TypeKey, before.seal(t, s.key, s.value)},
					} {
						// For a writer of type 1, type 0 is stale, and everything else is current.
						stale := w.typ != envelope.TypeSeed
						same(t, w.writer+", read by us", s.value, stale)(we.open(s.key, w.stored))
						same(t, w.writer+", read by kube-apiserver", s.value, stale)(they.open(s.key, w.stored))
						if o := decode(t, w.stored); envelope.Type(o.EncryptedDEKSourceType) != w.typ || o.KeyID != "key-1/version-1" {
							t.Errorf("%s: type %v, key ID %q", w.writer, o.EncryptedDEKSourceType, o.KeyID)
						}
					}
				})
			}
		})
	}
}

// same returns a check of the result of open.
func same(t *testing.T, what string, want []byte, wantStale bool) func([]byte, bool, error) {
	return func(got []byte, stale bool, err error) {
		t.Helper()
		switch {
		case err != nil:
			t.Errorf("%s: %v", what, err)
		case !bytes.Equal(got, want):
			t.Errorf("%s: %d bytes that are not the %d written", what, len(got), len(want))
		case stale != wantStale:
			t.Errorf("%s: stale is %v", what, stale)
		}
	}
}

// TestProcessesShareNothingButTheKMS reads with sides that never wrote, so that the plugin must
// unwrap the DEK seed for each of them: once, however many values there are.
func TestProcessesShareNothingButTheKMS(t *testing.T) {
	p := startPlugin(t, "1")
	// Their first health checks are the only ones: further ones would unwrap seeds, too.
	we, they := newOursPolling(t, p, provider, time.Hour), newKube(t, p, provider, envelope.TypeSeed)
	reader := newOursPolling(t, p, provider, time.Hour)
	for _, side := range []*ours{we, reader} {
		// whether a value is stale is known only after the KMS has reported its key ID
		side.await(t, "1")
	}
	readers := []func(key, stored []byte) ([]byte, bool, error){reader.open, newKube(t, p, provider, envelope.TypeSeed).open}
	for _, seal := range []func(testing.TB, []byte, []byte) []byte{we.seal, they.seal} {
		for i, open := range readers {
			before := p.unwraps()
			for n := range 20 {
				key, value := fmt.Appendf(nil, "/registry/secrets/ns/s%d", n), fmt.Appendf(nil, "value %d", n)
				same(t, fmt.Sprintf("reader %d", i), value, false)(open(key, seal(t, key, value)))
			}
			if n := p.unwraps() - before; n != 1 {
				t.Errorf("reader %d: %d seeds were unwrapped for 20 values under one", i, n)
			}
		}
	}
}

// TestRotation rotates the key of the KMS: both sides read values under the old key and report them
// as stale.
func TestRotation(t *testing.T) {
	p := startPlugin(t, "old")
	we, they := newOurs(t, p, provider), newKube(t, p, provider, envelope.TypeSeed)
	value := []byte("value")
	ourOld, theirOld := we.seal(t, secretKey, value), they.seal(t, secretKey, value)
	p.rotate("new")
	they.rotate(t, envelope.TypeSeed)
	we.await(t, "new")
	ourNew, theirNew := we.seal(t, secretKey, value), they.seal(t, secretKey, value)
	for _, v := range []struct {
		what   string
		stored []byte
		stale  bool
	}{
		{"ours, old key", ourOld, true}, {"kube-apiserver's, old key", theirOld, true},
		{"ours, new key", ourNew, false}, {"kube-apiserver's, new key", theirNew, false},
	} {
		same(t, v.what+", read by us", value, v.stale)(we.open(secretKey, v.stored))
		same(t, v.what+", read by kube-apiserver", value, v.stale)(they.open(secretKey, v.stored))
	}
}

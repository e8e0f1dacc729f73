package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

var update = flag.Bool("update", false, "have k8s.io/apiserver write the golden vectors again; read the diff")

// vectorFile is what k8s.io/apiserver wrote. It is in the folder of the package that must always be
// able to read it.
var vectorFile = filepath.Join("..", "..", "crypto", "envelope", "testdata", "kubernetes-vectors.json")

// vector is a stored value with all that is needed to decrypt it. Its fields are those of
// crypto/envelope's golden file.
type vector struct {
	Name        string
	Provider    string
	EtcdKey     []byte
	Type        envelope.Type
	Secret      []byte // what the KMS unwraps Source to
	KeyID       string
	Source      []byte
	AnnotKeys   []string `json:",omitempty"` // sorted; the writer chose the order in the bytes
	AnnotValues [][]byte `json:",omitempty"`
	Plaintext   []byte
	Stored      []byte
}

func (v *vector) annotations() map[string][]byte {
	if len(v.AnnotKeys) == 0 {
		return nil
	}
	m := map[string][]byte{}
	for i, k := range v.AnnotKeys {
		m[k] = v.AnnotValues[i]
	}
	return m
}

func loadVectors(tb testing.TB) []vector {
	tb.Helper()
	b, err := os.ReadFile(vectorFile)
	if err != nil {
		tb.Fatal(err)
	}
	var vs []vector
	if err := json.Unmarshal(b, &vs); err != nil {
		tb.Fatal(err)
	}
	return vs
}

// makeVectors has k8s.io/apiserver encrypt with a plugin that records what it wrapped.
func makeVectors(t *testing.T) []vector {
	t.Helper()
	annotations := map[string][]byte{"version.example.com": []byte("7"), "binary.example.com": {0, 0xff}, "empty.example.com": {}}
	var vs []vector
	for _, c := range []struct {
		name, provider, keyID string
		pad                   int
		annotations           map[string][]byte
		key, value            string
	}{
		{"secret", "ack", "key-hzz62f1cb66fa42qo8wbc/key-hzz62f1cb66fa42qo8wbc-1", 0, nil, "/registry/secrets/default/s1", "k8s\x00\n\x0c\n\x02v1\x12\x06Secret\x12\x05bytes"},
		{"empty value", "p", "1", 0, nil, "/registry/configmaps/default/c", ""},
		{"annotations", "dr", "schlüssel-1", 0, annotations, "/registry/secrets/kube-system/token", "token"},
		{"longest key ID and seed", "old-provider.example.com", strings.Repeat("k", 1024), 1024, nil, "/a\x00\xff", "binary etcd key"},
		{"nested", "ack", "key-1", 0, nil, "/registry/secrets/default/s2", "k8s:enc:kms:v2:ack:\x0a\x01x"},
		{"2 KiB", "ack", "key-1", 60, annotations, "/registry/example.com/widgets/ns/w", strings.Repeat("0123456789abcdef", 128)},
	} {
		for _, typ := range []envelope.Type{envelope.TypeSeed, envelope.TypeKey} {
			p := startPlugin(t, c.keyID)
			p.pad, p.annotate = c.pad, c.annotations
			k := newKube(t, p, c.provider, typ)
			v := vector{Name: c.name + ", " + []string{"key", "seed"}[typ], Provider: c.provider, EtcdKey: []byte(c.key), Type: typ, KeyID: c.keyID,
				Source: k.state.EncryptedObjectEncryptedDEKSource, Plaintext: []byte(c.value)}
			v.Secret = p.secret(v.Source)
			v.Stored = k.seal(t, v.EtcdKey, v.Plaintext)
			for _, name := range slices.Sorted(maps.Keys(c.annotations)) {
				v.AnnotKeys, v.AnnotValues = append(v.AnnotKeys, name), append(v.AnnotValues, c.annotations[name])
			}
			vs = append(vs, v)
		}
	}
	return vs
}

// TestVectors decrypts the committed vectors with k8s.io/apiserver's code and with ours: both must
// always be able to read what was written.
func TestVectors(t *testing.T) {
	if *update {
		b, err := json.MarshalIndent(makeVectors(t), "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(vectorFile, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	vs := loadVectors(t)
	if len(vs) != 12 {
		t.Errorf("%d vectors", len(vs))
	}
	for _, v := range vs {
		t.Run(v.Name, func(t *testing.T) {
			_, object, ok := envelope.Split(v.Stored)
			if !ok || !bytes.HasPrefix(v.Stored, []byte("k8s:enc:kms:v2:"+v.Provider+":")) {
				t.Fatalf("the marker is not that of %s", v.Provider)
			}
			if !accepted(t, "object", object) {
				t.Fatal("the object is not accepted")
			}
			o, err := envelope.Parse(object)
			if err != nil {
				t.Fatal(err)
			}
			if o.Type != v.Type || o.KeyID != v.KeyID || !bytes.Equal(o.Source, v.Source) || !maps.EqualFunc(o.Annotations, v.annotations(), bytes.Equal) {
				t.Errorf("header %+v", o.Header)
			}
			seed, err := envelope.NewSeed(o.Type, v.Secret)
			if err != nil {
				t.Fatal(err)
			}
			got, err := seed.Open(nil, v.EtcdKey, o.Data)
			if err != nil || !bytes.Equal(got, v.Plaintext) {
				t.Errorf("we open %q, %v", got, err)
			}
			theirs := kmsv2.NewEnvelopeTransformer(&known{v}, v.Provider, func() (kmsv2.State, error) { return kmsv2.State{}, nil }, "interop")
			got, _, err = theirs.TransformFromStorage(context.Background(), object, value.DefaultContext(v.EtcdKey))
			if err != nil || !bytes.Equal(got, v.Plaintext) {
				t.Errorf("kube-apiserver opens %q, %v", got, err)
			}
		})
	}
}

// known is a KMS that can unwrap the DEK seed of one vector.
type known struct{ v vector }

var _ service.Service = (*known)(nil)

func (k *known) Decrypt(_ context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	if req.KeyID != k.v.KeyID || !bytes.Equal(req.Ciphertext, k.v.Source) || !maps.EqualFunc(req.Annotations, k.v.annotations(), bytes.Equal) {
		return nil, errors.New("this seed is not known")
	}
	return bytes.Clone(k.v.Secret), nil
}

func (k *known) Encrypt(context.Context, string, []byte) (*service.EncryptResponse, error) {
	return nil, errors.New("this KMS only unwraps")
}

func (k *known) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: k.v.KeyID}, nil
}

// writeDeadline is how long the tests' API servers may write with one DEK seed.
const writeDeadline = time.Hour

// Package kmsdouble is a double of Alibaba Cloud KMS for tests: an HTTPS server with a CA of its
// own that speaks the product's RPC protocol (Kms, 2016-01-20) and is as strict as the original. It
// verifies each request's signature, nonce, timestamp, format and security token with code of its
// own, keeps keys with versions and states, and binds the EncryptionContext to what it encrypts.
// Faults can be injected into any answer ([Double.Inject], [Double.SetFault]). There are also
// doubles of the services that give its callers their credentials: the Security Token Service
// ([STS]) and an ECS instance's metadata server ([Metadata]).
//
// It shares no code with the client it tests. It keeps keys in memory only and must not be used for
// anything but tests.
package kmsdouble

import (
	"sync"
	"time"
)

// The credentials of a double whose Config names none.
const (
	DefaultAccessKeyID     = "LTAI5tKmsDoubleAccessKey"
	DefaultAccessKeySecret = "kmsDoubleSecretOf30Characters0"
)

// Config describes a double. The zero value is a double in cn-hangzhou with one enabled key and one
// access key.
type Config struct {
	// Region is the only region that requests may name; "cn-hangzhou" by default.
	Region string
	// AccessKeys are the callers that are known; by default one, [DefaultAccessKeyID].
	AccessKeys []AccessKey
	// Keys are the first keys; by default one, with the id [DefaultKeyID] and the alias
	// [DefaultAlias].
	Keys []KeyConfig
	// Dedicated makes a double of a dedicated instance's endpoint, which has only cryptographic
	// operations.
	Dedicated bool
	// Now is the double's clock; time.Now by default.
	Now func() time.Time
	// Dir is where the CA's certificate is written; by default a new temporary directory, which
	// Close removes.
	Dir string
	// ListenAddress is where to listen; by default a free port of 127.0.0.1.
	ListenAddress string
	// OnSecret is called with every plaintext that is wrapped, data keys among them, before the
	// answer to it. May be nil; it must be safe for concurrent use and may not keep secret.
	OnSecret func(what string, secret []byte)
}

// Double is a running server. It is safe for concurrent use.
type Double struct {
	*rpc
	dedicated bool
	onSecret  func(what string, secret []byte)

	keysMu  sync.Mutex
	keys    map[string]*key
	aliases map[string]string // alias to key id
}

// New starts a double that ends with the test. The test fails if a client misused it: see
// [Double.Violations].
func New(tb TB, cfg Config) *Double {
	tb.Helper()
	d, err := Start(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	d.endWith(tb, "KMS")
	return d
}

// Start starts a double; the caller owns it and must Close it.
func Start(cfg Config) (*Double, error) {
	d := &Double{dedicated: cfg.Dedicated, onSecret: cfg.OnSecret, keys: map[string]*key{}, aliases: map[string]string{}}
	d.rpc = newRPC(newGate("2016-01-20", cfg.Region, cfg.Now, cfg.AccessKeys), d.perform, "Plaintext")
	if d.onSecret == nil {
		d.onSecret = func(string, []byte) {}
	}
	if cfg.Keys == nil {
		cfg.Keys = []KeyConfig{{ID: DefaultKeyID, Alias: DefaultAlias}}
	}
	for _, k := range cfg.Keys {
		if err := d.AddKey(k); err != nil {
			return nil, err
		}
	}
	var err error
	d.server, err = start("kmsdouble", cfg.Dir, cfg.ListenAddress, false, d.serve)
	return d, err
}

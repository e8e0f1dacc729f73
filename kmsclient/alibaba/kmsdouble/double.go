// Package kmsdouble is a double of Alibaba Cloud KMS for tests: an HTTPS server with a CA of its own that speaks the product's
// RPC protocol (Kms, 2016-01-20) and is as strict as the original. It verifies each request's signature, nonce, timestamp, format
// and security token with code of its own, keeps keys with versions and states, and binds the EncryptionContext to what it
// encrypts. Faults can be injected into any answer ([Double.Inject], [Double.SetFault]).
//
// It shares no code with the client it tests. It keeps keys in memory only and must not be used for anything but tests.
package kmsdouble

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// The credentials of a double whose Config names none.
const (
	DefaultAccessKeyID     = "LTAI5tKmsDoubleAccessKey"
	DefaultAccessKeySecret = "kmsDoubleSecretOf30Characters0"
)

// Config describes a double. The zero value is a double in cn-hangzhou with one enabled key and one access key.
type Config struct {
	// Region is the only region that requests may name; "cn-hangzhou" by default.
	Region string
	// AccessKeys are the callers that are known; by default one, [DefaultAccessKeyID].
	AccessKeys []AccessKey
	// Keys are the first keys; by default one, with the id [DefaultKeyID] and the alias [DefaultAlias].
	Keys []KeyConfig
	// Dedicated makes a double of a dedicated instance's endpoint, which has only cryptographic operations.
	Dedicated bool
	// Now is the double's clock; time.Now by default.
	Now func() time.Time
	// Dir is where the CA's certificate is written; by default a new temporary directory, which Close removes.
	Dir string
	// ListenAddress is where to listen; by default a free port of 127.0.0.1.
	ListenAddress string
}

// AccessKey is a caller that the double knows.
type AccessKey struct {
	ID, Secret string
	// Token is the security token that a session's requests must carry. A long-term access key has none.
	Token string
	// Expires is when the session ends; zero for never.
	Expires time.Time
}

// Record is what the double remembers of a request, as the vendor's audit trail would.
type Record struct {
	Time      time.Time
	RequestID string
	Action    string
	KeyID     string // of the key that was used, if it came so far
	Version   string
	Code      string // "" for success
	Status    int    // HTTP status of the operation, whatever a fault made of the answer
	Fault     Kind   // "" for none
	Body      bool   // the parameters came in the body
}

// Double is a running server. It is safe for concurrent use.
type Double struct {
	region    string
	dedicated bool
	now       func() time.Time
	caFile    string
	ownDir    string // removed by Close
	listener  net.Listener
	server    *http.Server
	stopped   chan struct{}  // closed by Close: ends whatever hangs
	serving   sync.WaitGroup // the accept loop and the connections

	mu         sync.Mutex
	accessKeys map[string]AccessKey
	keys       map[string]*key
	aliases    map[string]string       // alias to key id
	nonces     map[[2]string]time.Time // by access key and nonce
	calls      map[string]int
	applied    map[string]int
	records    []Record
	violations []string
	fault      func(*http.Request) *FaultSpec
	queue      map[string][]FaultSpec // by action; "" for any
}

// TB is the part of testing.TB that New needs.
type TB interface {
	Helper()
	Cleanup(func())
	Fatal(args ...any)
	Errorf(format string, args ...any)
}

// New starts a double that ends with the test. The test fails if a client misused it: see [Double.Violations].
func New(tb TB, cfg Config) *Double {
	tb.Helper()
	d, err := Start(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Errorf("close the KMS double: %v", err)
		}
		for _, v := range d.Violations() {
			tb.Errorf("the KMS double was misused: %s", v)
		}
	})
	return d
}

// Start starts a double; the caller owns it and must Close it.
func Start(cfg Config) (*Double, error) {
	d := &Double{
		region: cmp.Or(cfg.Region, "cn-hangzhou"), dedicated: cfg.Dedicated, now: cfg.Now, stopped: make(chan struct{}),
		accessKeys: map[string]AccessKey{}, keys: map[string]*key{}, aliases: map[string]string{}, nonces: map[[2]string]time.Time{},
		calls: map[string]int{}, applied: map[string]int{}, queue: map[string][]FaultSpec{},
	}
	if d.now == nil {
		d.now = time.Now
	}
	if cfg.AccessKeys == nil {
		cfg.AccessKeys = []AccessKey{{ID: DefaultAccessKeyID, Secret: DefaultAccessKeySecret}}
	}
	for _, k := range cfg.AccessKeys {
		d.accessKeys[k.ID] = k
	}
	if cfg.Keys == nil {
		cfg.Keys = []KeyConfig{{ID: DefaultKeyID, Alias: DefaultAlias}}
	}
	for _, k := range cfg.Keys {
		if err := d.AddKey(k); err != nil {
			return nil, err
		}
	}
	caPEM, certificate, err := newCertificates(time.Now())
	if err != nil {
		return nil, err
	}
	dir := cfg.Dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "kmsdouble-"); err != nil {
			return nil, fmt.Errorf("make directory: %w", err)
		}
		d.ownDir = dir
	}
	d.caFile = filepath.Join(dir, "kmsdouble-ca.pem")
	if err := os.WriteFile(d.caFile, caPEM, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("write CA: %w", err), d.removeDir())
	}
	d.listener, err = tls.Listen("tcp", cmp.Or(cfg.ListenAddress, "127.0.0.1:0"), &tls.Config{
		Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12,
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen: %w", err), d.removeDir())
	}
	d.server = &http.Server{
		Handler:           http.HandlerFunc(d.serve),
		ErrorLog:          log.New(io.Discard, "", 0), // cut connections are what the double is for
		ReadHeaderTimeout: 10 * time.Second,
		ConnState:         d.trackConn,
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, new(connState))
		},
	}
	d.serving.Go(func() { _ = d.server.Serve(d.listener) })
	return d, nil
}

// trackConn keeps Close waiting for connections.
func (d *Double) trackConn(_ net.Conn, s http.ConnState) {
	switch s {
	case http.StateNew:
		d.serving.Add(1)
	case http.StateClosed, http.StateHijacked:
		d.serving.Done()
	}
}

// Close ends all connections and waits for what is under way.
func (d *Double) Close() error {
	select {
	case <-d.stopped:
		return nil
	default:
	}
	close(d.stopped)
	err := d.server.Close()
	d.serving.Wait()
	return errors.Join(err, d.removeDir())
}

func (d *Double) removeDir() error {
	if d.ownDir == "" {
		return nil
	}
	return os.RemoveAll(d.ownDir)
}

// Endpoint returns "host:port", as a client's configuration wants it.
func (d *Double) Endpoint() string { return d.listener.Addr().String() }

// URL returns the double's address with its scheme.
func (d *Double) URL() string { return "https://" + d.Endpoint() }

// CAFile returns the path of the PEM certificate that signed the double's own.
func (d *Double) CAFile() string { return d.caFile }

// Region returns the region that requests must name.
func (d *Double) Region() string { return d.region }

// SetAccessKey adds or replaces a caller.
func (d *Double) SetAccessKey(k AccessKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.accessKeys[k.ID] = k
}

// RemoveAccessKey makes a caller unknown.
func (d *Double) RemoveAccessKey(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.accessKeys, id)
}

// Calls returns how many requests named the action, whatever became of them.
func (d *Double) Calls(action string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[action]
}

// Applied returns how many requests of the action were carried out, even if a fault then spoiled the answer.
func (d *Double) Applied(action string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.applied[action]
}

// CallCounts returns the number of requests by action.
func (d *Double) CallCounts() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.calls)
}

// Records returns what the double remembers of each request, oldest first.
func (d *Double) Records() []Record {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.records)
}

// Violations returns what clients did that no client should, such as a plaintext in a URL or a parameter given twice.
func (d *Double) Violations() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.violations)
}

func (d *Double) violate(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.violations = append(d.violations, fmt.Sprintf(format, args...))
}

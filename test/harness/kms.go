package harness

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
)

// KMS is a Kubernetes KMS v2 plugin in the test's own process: AES-256-GCM under versioned keys.
// Every secret that it wraps is added to the environment's canaries. It is safe for concurrent use.
type KMS struct {
	kmsapi.UnimplementedKeyManagementServiceServer
	env *Env
	// Socket is the endpoint: unix:///path.
	Socket string
	// IDSuffix is appended to the ID of each key. It is set before Start.
	IDSuffix string
	path     string

	mu               sync.Mutex
	server           *grpc.Server
	versions         int
	encrypts         int
	decrypts         int
	disabled         bool
	noReasons        bool                // see OmitReasons
	down             bool                // see Down
	statusFailsFor   time.Duration       // see FailStatusAfterErrors
	statusFailsUntil time.Time           // see FailStatusAfterErrors
	hanging          map[string]struct{} // see Hang
}

// NewKMS returns a plugin with one key version; it does not serve before [KMS.Start].
func (e *Env) NewKMS(name string) *KMS {
	path := filepath.Join(e.Dir, name+"-kms.sock")
	k := &KMS{env: e, path: path, Socket: "unix://" + path, versions: 1}
	e.TB.Cleanup(k.Stop)
	return k
}

// Config returns the proxy's provider of the given name for this plugin, polled every second.
func (k *KMS) Config(name string) KMSConfig {
	return KMSConfig{Name: name, PollInterval: "1s", Plugin: &PluginKMS{Endpoint: k.Socket, Timeout: "2s"}}
}

// Start serves on the socket.
func (k *KMS) Start() {
	k.env.TB.Helper()
	if err := os.Remove(k.path); err != nil && !os.IsNotExist(err) {
		k.env.TB.Fatalf("remove stale socket: %v", err)
	}
	listener, err := net.Listen("unix", k.path)
	if err != nil {
		k.env.TB.Fatalf("listen for KMS calls: %v", err)
	}
	server := grpc.NewServer()
	kmsapi.RegisterKeyManagementServiceServer(server, k)
	k.mu.Lock()
	k.server = server
	k.mu.Unlock()
	go server.Serve(listener)
}

// Stop closes every connection and stops serving, as a crash of the plugin would.
func (k *KMS) Stop() {
	k.mu.Lock()
	server := k.server
	k.server = nil
	k.mu.Unlock()
	if server != nil {
		server.Stop()
	}
}

// Rotate adds a key version; the old ones still unwrap.
func (k *KMS) Rotate() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.versions++
}

// Disable makes every call fail as with a disabled key, or ends that.
func (k *KMS) Disable(disabled bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.disabled = disabled
}

// OmitReasons makes every call that fails return the code Unknown without a reason, like most
// public plugins.
func (k *KMS) OmitReasons(omit bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noReasons = omit
}

// Down makes every call fail as behind a plugin whose own KMS is unreachable, or ends that: the
// plugin responds with the code Unknown.
func (k *KMS) Down(down bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.down = down
}

// FailStatusAfterErrors makes Status report a fault for this long after each Decrypt that failed,
// like the plugin for AWS.
func (k *KMS) FailStatusAfterErrors(d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.statusFailsFor = d
}

// Hang makes every Decrypt of a wrapped DEK seed time out.
func (k *KMS) Hang(source []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.hanging == nil {
		k.hanging = make(map[string]struct{})
	}
	k.hanging[string(source)] = struct{}{}
}

func (k *KMS) hangs(source []byte) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, ok := k.hanging[string(source)]
	return ok
}

// failed returns the error of the plugin for a Decrypt that failed with err; nil for nil.
func (k *KMS) failed(err error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil {
		return nil
	}
	k.statusFailsUntil = time.Now().Add(k.statusFailsFor)
	if k.noReasons {
		return status.Error(codes.Unknown, "failed to decrypt")
	}
	return err
}

// usable returns the error of calls with a disabled key.
func (k *KMS) usable() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.disabled {
		return status.Error(codes.FailedPrecondition, "the key is disabled")
	}
	if k.down {
		return status.Error(codes.Unknown, "the KMS is out of reach")
	}
	return nil
}

// Calls returns the numbers of wraps and unwraps.
func (k *KMS) Calls() (encrypts, decrypts int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.encrypts, k.decrypts
}

// KeyID returns the ID of the current key version.
func (k *KMS) KeyID() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.keyID(k.versions)
}

func (k *KMS) keyID(version int) string { return fmt.Sprintf("plugin-key/%d%s", version, k.IDSuffix) }

// annotation is returned with each wrapped DEK seed and must be passed back.
const annotation = "version.test.etcd-kms-proxy.io"

// Status implements KMS v2.
func (k *KMS) Status(context.Context, *kmsapi.StatusRequest) (*kmsapi.StatusResponse, error) {
	if err := k.usable(); err != nil {
		return nil, err
	}
	k.mu.Lock()
	statusFails := time.Now().Before(k.statusFailsUntil)
	k.mu.Unlock()
	if statusFails {
		return &kmsapi.StatusResponse{Version: "v2", Healthz: "err", KeyId: k.KeyID()}, nil
	}
	return &kmsapi.StatusResponse{Version: "v2", Healthz: "ok", KeyId: k.KeyID()}, nil
}

// Encrypt implements KMS v2.
func (k *KMS) Encrypt(_ context.Context, request *kmsapi.EncryptRequest) (*kmsapi.EncryptResponse, error) {
	k.env.Sealed.Add("a secret that the KMS plugin wrapped", request.Plaintext)
	if err := k.usable(); err != nil {
		return nil, err
	}
	k.mu.Lock()
	k.encrypts++
	version := k.versions
	k.mu.Unlock()
	aead, err := k.aead(version)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce)
	return &kmsapi.EncryptResponse{
		Ciphertext:  aead.Seal(nonce, nonce, request.Plaintext, nil),
		KeyId:       k.keyID(version),
		Annotations: map[string][]byte{annotation: []byte(fmt.Sprint(version))},
	}, nil
}

// Decrypt implements KMS v2.
func (k *KMS) Decrypt(ctx context.Context, request *kmsapi.DecryptRequest) (*kmsapi.DecryptResponse, error) {
	if k.hangs(request.Ciphertext) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	r, err := k.decrypt(request)
	return r, k.failed(err)
}

func (k *KMS) decrypt(request *kmsapi.DecryptRequest) (*kmsapi.DecryptResponse, error) {
	k.mu.Lock()
	k.decrypts++
	k.mu.Unlock()
	if err := k.usable(); err != nil {
		return nil, err
	}
	var version int
	if _, err := fmt.Sscanf(request.KeyId, "plugin-key/%d", &version); err != nil || string(request.Annotations[annotation]) != fmt.Sprint(version) {
		return nil, status.Errorf(codes.InvalidArgument, "unwrap: key ID %q does not go with annotation %q", request.KeyId, request.Annotations[annotation])
	}
	aead, err := k.aead(version)
	if err != nil {
		return nil, err
	}
	if len(request.Ciphertext) < aead.NonceSize() {
		return nil, status.Error(codes.InvalidArgument, "unwrap: too short")
	}
	plaintext, err := aead.Open(nil, request.Ciphertext[:aead.NonceSize()], request.Ciphertext[aead.NonceSize():], nil)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "unwrap: not wrapped under this key")
	}
	return &kmsapi.DecryptResponse{Plaintext: plaintext}, nil
}

func (k *KMS) aead(version int) (cipher.AEAD, error) {
	block, err := aes.NewCipher(k.env.Sealed.Key(1000 + version))
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

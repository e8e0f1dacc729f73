package harness

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// APIServerConfig configures a kube-apiserver.
type APIServerConfig struct {
	// Name is the prefix of the names of its files; "apiserver" by default.
	Name string
	// EtcdServers is --etcd-servers.
	EtcdServers string
	// SecretsAt stores only Secrets elsewhere (--etcd-servers-overrides) if it is not empty.
	SecretsAt string
	// CAFile and the client certificate are for etcd servers with https.
	CAFile string
	Client Pair
	// EncryptionConfig is a file for the API server's own encryption.
	EncryptionConfig string
	// Flags are appended to the command line.
	Flags []string
}

// APIServer is a running kube-apiserver.
type APIServer struct {
	*Process
	env  *Env
	name string
	args []string
	// Config is for clients that are cluster admins.
	Config *rest.Config
	// Client is a typed client without client-side rate limit.
	Client *kubernetes.Clientset
}

// StartAPIServer starts a kube-apiserver and waits until it is ready. Clients trust only the
// certificate that it generated in its own folder, so no other server can respond in its place.
func (e *Env) StartAPIServer(cfg APIServerConfig) *APIServer {
	e.TB.Helper()
	a := e.NewAPIServer(cfg)
	a.Start()
	a.WaitReady(90 * time.Second)
	return a
}

// NewAPIServer prepares a kube-apiserver without starting it.
func (e *Env) NewAPIServer(cfg APIServerConfig) *APIServer {
	e.TB.Helper()
	if cfg.Name == "" {
		cfg.Name = "apiserver"
	}
	dir := filepath.Join(e.Dir, cfg.Name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		e.TB.Fatalf("make folder: %v", err)
	}
	// All API servers of an environment share the service account key, like those of a control
	// plane.
	saKey := filepath.Join(e.Dir, "sa.key")
	if _, err := os.Stat(saKey); err != nil {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			e.TB.Fatalf("make service account key: %v", err)
		}
		public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
		if err != nil {
			e.TB.Fatalf("encode service account key: %v", err)
		}
		e.File("sa.key", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
		e.File("sa.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))
	}
	token := e.Sealed.Value("admin-token")
	tokens := e.File("tokens.csv", []byte(token+",admin,admin-uid,system:masters\n"))
	port := FreePort(e.TB)
	a := &APIServer{env: e, name: cfg.Name}
	a.args = []string{
		"--etcd-servers=" + cfg.EtcdServers,
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port), "--advertise-address=192.0.2.10",
		"--service-cluster-ip-range=10.0.0.0/24",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + filepath.Join(e.Dir, "sa.pub"), "--service-account-signing-key-file=" + saKey,
		"--token-auth-file=" + tokens, "--authorization-mode=RBAC", "--cert-dir=" + dir,
		// Probe etcd's health often enough for a test.
		"--etcd-healthcheck-timeout=1s", "--etcd-readycheck-timeout=1s", "--etcd-compaction-interval=0",
	}
	if cfg.SecretsAt != "" {
		a.args = append(a.args, "--etcd-servers-overrides=/secrets#"+cfg.SecretsAt)
	}
	if cfg.CAFile != "" {
		a.args = append(a.args, "--etcd-cafile="+cfg.CAFile, "--etcd-certfile="+cfg.Client.CertFile, "--etcd-keyfile="+cfg.Client.KeyFile)
	}
	if cfg.EncryptionConfig != "" {
		a.args = append(a.args, "--encryption-provider-config="+cfg.EncryptionConfig)
	}
	a.args = append(a.args, cfg.Flags...)
	a.Config = &rest.Config{
		Host: fmt.Sprintf("https://127.0.0.1:%d", port), BearerToken: token, QPS: -1, Timeout: 30 * time.Second,
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(dir, "apiserver.crt")},
	}
	e.TB.Cleanup(func() {
		if a.Process != nil {
			// It has no state that a kill could lose, and its graceful shutdown takes seconds.
			a.Kill()
		}
	})
	return a
}

// Start starts the API server, for the first time or again, and does not wait for it.
func (a *APIServer) Start() {
	a.env.TB.Helper()
	a.Process = a.env.spawn(a.name, Bin(a.env.TB, "kube-apiserver"), a.args...)
}

// WaitReady waits for /readyz and for the objects that the API server creates itself, then sets
// Client.
func (a *APIServer) WaitReady(within time.Duration) {
	a.env.TB.Helper()
	Eventually(a.env.TB, within, a.name+" to be ready", func() error {
		if err := a.Alive(); err != nil {
			return err
		}
		return a.Ready()
	})
}

// Ready requests /readyz.
func (a *APIServer) Ready() error {
	if a.Client == nil {
		// The certificate may not be written yet, and with an empty file the client would trust the
		// system's CAs from then on.
		data, err := os.ReadFile(a.Config.CAFile)
		if err != nil {
			return err
		}
		if !x509.NewCertPool().AppendCertsFromPEM(data) {
			return fmt.Errorf("no certificate in %s yet", a.Config.CAFile)
		}
		client, err := kubernetes.NewForConfig(a.Config)
		if err != nil {
			return err
		}
		a.Client = client
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	body, err := a.Client.RESTClient().Get().AbsPath("/readyz").Param("verbose", "true").DoRaw(ctx)
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.ReplaceAll(string(body), "\n", "; "))
	}
	return nil
}

// Kubectl runs kubectl as cluster admin, for at most two minutes, and returns what it printed to
// both outputs.
func (a *APIServer) Kubectl(args ...string) string {
	a.env.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	all := append([]string{"--server", a.Config.Host, "--token", a.Config.BearerToken, "--certificate-authority", a.Config.CAFile, "--kubeconfig", os.DevNull, "--cache-dir", filepath.Join(a.env.Dir, "kubectl")}, args...)
	cmd := exec.CommandContext(ctx, Bin(a.env.TB, "kubectl"), all...)
	cmd.SysProcAttr = endWithParent()
	out, err := cmd.CombinedOutput()
	if err != nil {
		a.env.TB.Fatalf("kubectl %q: %v\n%s", args, err, out)
	}
	return string(out)
}

package harness

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// ProxyConfig is the proxy's configuration file. The field names are those of the product.
type ProxyConfig struct {
	APIVersion string      `json:"apiVersion"`
	Kind       string      `json:"kind"`
	Listeners  []Listener  `json:"listeners"`
	Etcd       Upstream    `json:"etcd"`
	KMS        []KMSConfig `json:"kms,omitempty"`
	Rules      []Rule      `json:"rules"`
	Cache      *Cache      `json:"cache,omitempty"`
	// Coordination is on by default, and then adds revisions of its own to etcd's.
	Coordination *Coordination `json:"coordination,omitempty"`
	Admin        Admin         `json:"admin"`
	Audit        *Audit        `json:"audit,omitempty"`
	Log          LogConfig     `json:"log"`
}

type (
	// Listener is one address for clients.
	Listener struct {
		Address           string     `json:"address"`
		TLS               *ServerTLS `json:"tls,omitempty"`
		AllowedClients    []string   `json:"allowedClients,omitempty"`
		CiphertextClients []string   `json:"ciphertextClients,omitempty"`
		// AdvertiseClientURLs replace the members' own URLs.
		AdvertiseClientURLs []string `json:"advertiseClientURLs,omitempty"`
		// Endpoint is the only endpoint of etcd that the listener uses.
		Endpoint string `json:"endpoint,omitempty"`
		// Gateway false turns the JSON gateway off.
		Gateway *bool `json:"gateway,omitempty"`
	}
	// ServerTLS names PEM files.
	ServerTLS struct {
		CertFile     string `json:"certFile"`
		KeyFile      string `json:"keyFile"`
		ClientCAFile string `json:"clientCAFile,omitempty"`
		// ClientCRLFile lists revoked clients.
		ClientCRLFile string `json:"clientCRLFile,omitempty"`
	}
	// Upstream is the etcd behind the proxy.
	Upstream struct {
		Endpoints       []string   `json:"endpoints"`
		HTTPEndpoints   []string   `json:"httpEndpoints,omitempty"`
		TLS             *ClientTLS `json:"tls,omitempty"`
		MaxRequestBytes int        `json:"maxRequestBytes,omitempty"`
		Username        string     `json:"username,omitempty"`
		PasswordFile    string     `json:"passwordFile,omitempty"`
	}
	// ClientTLS names PEM files.
	ClientTLS struct {
		CAFile   string `json:"caFile"`
		CertFile string `json:"certFile,omitempty"`
		KeyFile  string `json:"keyFile,omitempty"`
	}
	// KMSConfig is one provider.
	KMSConfig struct {
		Name         string     `json:"name"`
		PollInterval string     `json:"pollInterval,omitempty"`
		Local        *LocalKMS  `json:"local,omitempty"`
		Plugin       *PluginKMS `json:"plugin,omitempty"`
		Alibaba      *Alibaba   `json:"alibaba,omitempty"`

		Kubernetes *KubernetesKeys `json:"kubernetes,omitempty"`
		Age        *AgeKMS         `json:"age,omitempty"`
	}
	// AgeKMS are the recipients of recovery copies.
	AgeKMS struct {
		Recipients     []string `json:"recipients,omitempty"`
		RecipientsFile string   `json:"recipientsFile,omitempty"`
	}
	// KubernetesKeys are keys of one of kube-apiserver's own providers, for reading.
	KubernetesKeys struct {
		Type    string `json:"type"`
		KeyFile string `json:"keyFile"`
	}
	// Alibaba is a key of Alibaba Cloud KMS.
	Alibaba struct {
		Region      string             `json:"region"`
		KeyID       string             `json:"keyID"`
		Endpoint    string             `json:"endpoint"`
		CAFile      string             `json:"caFile"`
		Credentials AlibabaCredentials `json:"credentials"`
	}
	// AlibabaCredentials name files.
	AlibabaCredentials struct {
		Type                string `json:"type"`
		AccessKeyIDFile     string `json:"accessKeyIDFile"`
		AccessKeySecretFile string `json:"accessKeySecretFile"`
		RoleARN             string `json:"roleARN,omitempty"`
		STSEndpoint         string `json:"stsEndpoint,omitempty"`
		STSCAFile           string `json:"stsCAFile,omitempty"`
	}
	// LocalKMS is a key file.
	LocalKMS struct {
		KeyFile string `json:"keyFile"`
	}
	// PluginKMS is a Kubernetes KMS v2 socket.
	PluginKMS struct {
		Endpoint string `json:"endpoint"`
		Timeout  string `json:"timeout,omitempty"`
	}
	// Rule encrypts the values of keys with a prefix.
	Rule struct {
		Prefix              string   `json:"prefix"`
		WriteWith           string   `json:"writeWith"`
		ReadWith            []string `json:"readWith,omitempty"`
		Recovery            []string `json:"recovery,omitempty"`
		RecoveryRequired    bool     `json:"recoveryRequired,omitempty"`
		AllowPlaintextReads *bool    `json:"allowPlaintextReads,omitempty"`
		OnUndecryptable     string   `json:"onUndecryptable,omitempty"`
	}
	// Cache limits how much is cached, and for how long.
	Cache struct {
		TTL                 string `json:"ttl,omitempty"`
		ServeUnreachableFor string `json:"serveUnreachableFor,omitempty"`
		SealUnreachableFor  string `json:"sealUnreachableFor,omitempty"`
		RevokeWithin        string `json:"revokeWithin,omitempty"`
	}
	// Admin is the admin server.
	Admin struct {
		Address string `json:"address"`
	}
	// Coordination configures the keys that the proxy keeps in etcd.
	Coordination struct {
		Enabled     *bool  `json:"enabled,omitempty"`
		Prefix      string `json:"prefix,omitempty"`
		WatchBypass *bool  `json:"watchBypass,omitempty"`
	}
	// Audit is the audit log.
	Audit struct {
		Path     string `json:"path"`
		KeyFile  string `json:"keyFile,omitempty"`
		Required bool   `json:"required,omitempty"`
	}
	// LogConfig sets level and format.
	LogConfig struct {
		Level  string `json:"level,omitempty"`
		Format string `json:"format,omitempty"`
	}
)

// Proxy is a running etcd-kms-proxy.
type Proxy struct {
	*Process
	env  *Env
	name string
	// ConfigFile is the path of the configuration.
	ConfigFile string
	// Config is the content of the configuration.
	Config ProxyConfig
	// Address is the first listener, as clients write it: host:port or unix:///path.
	Address string
	// TLS is for clients of a TLS listener made by [Env.TLSListener].
	TLS *tls.Config
	// Args are further arguments of serve.
	Args []string
	// Binary is the file to run; empty for the one that `make build` builds. It takes effect at the
	// next start.
	Binary  string
	scrapes int
}

// LocalKey writes a key file with n versions of recognizable key material for the local backend.
func (e *Env) LocalKey(name string, n int) KMSConfig {
	e.TB.Helper()
	type key struct {
		ID     string `json:"id"`
		Secret string `json:"secret"`
	}
	var keys []key
	for i := range n {
		keys = append(keys, key{ID: fmt.Sprint(i + 1), Secret: base64.StdEncoding.EncodeToString(e.Sealed.Key(i))})
	}
	data, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		e.TB.Fatalf("encode key file: %v", err)
	}
	return KMSConfig{Name: name, Local: &LocalKMS{KeyFile: e.File(name+"-key.yaml", data)}}
}

// UnixListener returns a listener on a unix socket in the temporary folder.
func (e *Env) UnixListener(name string) Listener {
	return Listener{Address: "unix://" + filepath.Join(e.Dir, name+".sock")}
}

// StartProxy writes the configuration, starts the proxy and waits until it serves. It adds what
// every file needs, an admin address, and a loopback listener if there is none. The proxy need not
// be ready.
func (e *Env) StartProxy(name string, cfg ProxyConfig) *Proxy {
	e.TB.Helper()
	p := e.NewProxy(name, cfg)
	p.Start()
	return p
}

// NewProxy is StartProxy without the start.
func (e *Env) NewProxy(name string, cfg ProxyConfig) *Proxy {
	e.TB.Helper()
	cfg.APIVersion, cfg.Kind = "etcd-kms-proxy.io/v1alpha1", "ProxyConfiguration"
	if len(cfg.Listeners) == 0 {
		cfg.Listeners = []Listener{{Address: FreeAddress(e.TB)}}
	}
	if cfg.Admin.Address == "" {
		cfg.Admin.Address = FreeAddress(e.TB)
	}
	if cfg.Log.Level == "" {
		cfg.Log.Level = "debug"
	}
	if cfg.Rules == nil {
		cfg.Rules = []Rule{}
	}
	data, err := json.MarshalIndent(cfg, "", "  ")
	if err != nil {
		e.TB.Fatalf("encode configuration: %v", err)
	}
	p := &Proxy{env: e, name: name, Config: cfg, Address: cfg.Listeners[0].Address, ConfigFile: e.File(name+".yaml", data)}
	e.TB.Cleanup(p.end)
	return p
}

// Start starts the proxy again with the same configuration, after [Process.Kill] or [Process.Stop].
func (p *Proxy) Start() {
	p.env.TB.Helper()
	p.Process = nil
	before := ""
	if data, err := os.ReadFile(filepath.Join(p.env.Dir, p.name+".log")); err == nil {
		before = string(data)
	}
	binary := p.Binary
	if binary == "" {
		binary = Bin(p.env.TB, "etcd-kms-proxy")
	}
	p.Process = p.env.spawn(p.name, binary, append([]string{"serve", "--config", p.ConfigFile}, p.Args...)...)
	Eventually(p.env.TB, 30*time.Second, p.name+" to serve", func() error {
		if err := p.Alive(); err != nil {
			return err
		}
		// Version 0.1.0 says serving instead of listening.
		if log := p.Log()[len(before):]; !strings.Contains(log, `"msg":"listening"`) && !strings.Contains(log, `"msg":"serving"`) {
			return fmt.Errorf("the log has no line with \"msg\":\"listening\" yet")
		}
		status, body, err := p.get("/livez")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("/livez answers %d: %s", status, body)
		}
		return err
	})
}

// end keeps a last scrape for the search, then stops the proxy.
func (p *Proxy) end() {
	if p.Process == nil || p.Alive() != nil {
		return
	}
	p.Scrape()
	if !p.Stop(20 * time.Second) {
		p.env.TB.Errorf("%s did not end within 20 s of SIGTERM", p.name)
	}
}

// Scrape reads every page of the admin server, keeps them for the search for secrets, and returns
// the metrics.
func (p *Proxy) Scrape() string {
	p.scrapes++
	var all strings.Builder
	var metrics string
	for _, path := range []string{"/metrics", "/livez?verbose", "/readyz?verbose"} {
		status, body, err := p.get(path)
		if path == "/metrics" {
			metrics = body
			if err != nil || status != http.StatusOK {
				p.env.TB.Errorf("scrape %s: status %d, %v", p.name, status, err)
			}
		}
		fmt.Fprintf(&all, "%s %d %v\n%s\n", path, status, err, body)
	}
	p.env.addLog(p.env.File(fmt.Sprintf("%s-scrape-%d.txt", p.name, p.scrapes), []byte(all.String())))
	return metrics
}

// Report returns the response of /readyz: the status, a line break, the checks. It is safe for
// concurrent use.
func (p *Proxy) Report() string {
	status, body, err := p.get("/readyz?verbose")
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d\n%s", status, body)
}

// Ready returns nil if /readyz responds with 200 and no failed check, and otherwise an error with
// its text. It is safe for concurrent use.
func (p *Proxy) Ready() error {
	if report := p.Report(); !strings.HasPrefix(report, "200\n") || strings.Contains(report, "[-]") {
		return fmt.Errorf("/readyz answers %s", report)
	}
	return nil
}

// WaitReady waits until the proxy reports that it can serve every rule.
func (p *Proxy) WaitReady(within time.Duration) {
	p.env.TB.Helper()
	Eventually(p.env.TB, within, p.name+" to be ready", func() error {
		if err := p.Alive(); err != nil {
			return err
		}
		return p.Ready()
	})
}

func (p *Proxy) get(path string) (int, string, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get("http://" + p.Config.Admin.Address + path)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

// URL returns the first listener as etcd's clients and kube-apiserver's --etcd-servers write it.
func (p *Proxy) URL() string {
	switch {
	case strings.HasPrefix(p.Address, "unix://"):
		return p.Address
	case p.Config.Listeners[0].TLS != nil:
		return "https://" + p.Address
	}
	return "http://" + p.Address
}

// NoCoordination is for tests and benchmarks that compare revisions with etcd alone.
func NoCoordination() *Coordination { return &Coordination{Enabled: new(false)} }

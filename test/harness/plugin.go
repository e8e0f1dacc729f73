package harness

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Plugin is a running `etcd-kms-proxy kms serve-plugin`.
type Plugin struct {
	*Process
	env  *Env
	name string
	args []string
	// Socket is its endpoint: unix:///path.
	Socket string
}

// StartPlugin serves one of the providers as a KMS v2 plugin on its own socket, and waits until it
// serves.
func (e *Env) StartPlugin(name, provider string, kms ...KMSConfig) *Plugin {
	e.TB.Helper()
	// What every file needs, in addition to what the plugin uses.
	data, err := json.MarshalIndent(map[string]any{
		"apiVersion": "etcd-kms-proxy.io/v1alpha1", "kind": "ProxyConfiguration",
		"listeners": []Listener{{Address: "127.0.0.1:0"}}, "etcd": Upstream{Endpoints: []string{"http://127.0.0.1:1"}},
		"kms": kms, "log": LogConfig{Level: "debug"},
	}, "", "  ")
	if err != nil {
		e.TB.Fatalf("encode configuration: %v", err)
	}
	p := &Plugin{env: e, name: name, Socket: "unix://" + filepath.Join(e.Dir, name+".sock")}
	p.args = []string{"kms", "serve-plugin", "--config", e.File(name+".yaml", data), "--name", provider, "--socket", p.Socket}
	e.TB.Cleanup(func() {
		if p.Process != nil && p.Alive() == nil && !p.Stop(20*time.Second) {
			e.TB.Errorf("%s did not end within 20 s of SIGTERM", p.name)
		}
	})
	p.Start()
	return p
}

// Start starts the plugin again on the same socket, after [Process.Kill] or [Process.Stop].
func (p *Plugin) Start() {
	p.env.TB.Helper()
	before := 0
	if data, err := os.ReadFile(filepath.Join(p.env.Dir, p.name+".log")); err == nil {
		before = len(data)
	}
	p.Process = p.env.spawn(p.name, Bin(p.env.TB, "etcd-kms-proxy"), p.args...)
	Eventually(p.env.TB, 30*time.Second, p.name+" to serve", func() error {
		if err := p.Alive(); err != nil {
			return err
		}
		if !strings.Contains(p.Log()[before:], `"msg":"serving"`) {
			return fmt.Errorf("the log has no line with \"msg\":\"serving\" yet")
		}
		return nil
	})
}

package cli

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/plugin"
)

// seedText is what the tests have wrapped; no command may print it.
const seedText = "Seed-of-the-tests-of-serve-plugin"

// servePluginOn runs serve-plugin on a socket in a process of its own until the test ends, and
// waits until it serves.
func servePluginOn(t *testing.T, config, name, socket string, args ...string) *running {
	t.Helper()
	clitest.Told.Secret("a seed", []byte(seedText))
	s := runServer(t, append([]string{"kms", "serve-plugin", "--config", config, "--name", name, "--socket", socket}, args...)...)
	s.logged(`"msg":"serving"`, fmt.Sprintf("%q:%q", "provider", name))
	return s
}

// runServer runs a command in a process of its own until the test ends.
func runServer(t *testing.T, args ...string) *running {
	t.Helper()
	s := &running{t: t, cmd: process(args...), done: make(chan struct{})}
	s.cmd.Stderr = s
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(s.done)
		_ = s.cmd.Wait() // its code says it
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		<-s.done
		clitest.Told.Output([]byte(s.text()))
		if t.Failed() {
			t.Logf("log of %s:\n%s", args[1], s.text())
		}
	})
	return s
}

func pluginClient(t *testing.T, socket string) *plugin.KMS {
	t.Helper()
	k, err := plugin.New(plugin.Config{Endpoint: "unix://" + strings.TrimPrefix(socket, "unix://")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// TestServePlugin runs the command through its life: both forms of the socket, both signals.
func TestServePlugin(t *testing.T) {
	for form, sig := range map[string]syscall.Signal{"": syscall.SIGTERM, "unix://": syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			d, dir := clitest.NewDir(t), kmstest.SocketDir(t)
			path := filepath.Join(dir, "kms.sock")
			s := servePluginOn(t, d.Config(t), "dev", form+path)
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%v, %v; want mode 0600", info, err)
			}
			k := pluginClient(t, path)
			res, err := k.Encrypt(t.Context(), "uid", []byte(seedText))
			if err != nil {
				t.Fatal(err)
			}
			// What it wraps, the backend itself unwraps, whatever annotations the server may add.
			backend, err := local.New(local.Config{KeyFile: d.Path("key.yaml")})
			if err != nil {
				t.Fatal(err)
			}
			got, err := backend.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: map[string][]byte{"request-id.etcd-kms-proxy.io": nil}})
			if err != nil || string(got) != seedText {
				t.Errorf("%q, %v", got, err)
			}
			if st, err := k.Status(t.Context()); err != nil || st.KeyID != "1" || st.Healthz != "ok" {
				t.Errorf("%+v, %v", st, err)
			}
			for _, text := range []string{
				`etcd_kms_proxy_kms_healthy{provider="dev"} 1`, `etcd_kms_proxy_kms_key_info{key_id="1",provider="dev"} 1`,
				`etcd_kms_proxy_plugin_calls_total{code="OK",operation="Encrypt"} 1`, `etcd_kms_proxy_plugin_calls_total{code="OK",operation="Status"} 1`,
				`etcd_kms_proxy_kms_operations_total{class="ok",operation="Encrypt",provider="dev"} 1`, "etcd_kms_proxy_kms_last_success_timestamp_seconds", "go_goroutines",
			} {
				if _, page := get(t, s, "/metrics"); !strings.Contains(page, text) {
					t.Errorf("metrics have no %q", text)
				}
			}
			if code, page := get(t, s, "/readyz"); code != http.StatusOK || !strings.Contains(page, "[+]kms dev ok") {
				t.Errorf("readyz: %d %s", code, page)
			}
			if limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", s.cmd.Process.Pid)); err == nil {
				for line := range strings.Lines(string(limits)) {
					if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Fields(rest)[1] != "0" {
						t.Errorf("core limit: %s", line)
					}
				}
			}
			s.signal(sig)
			s.signal(sig) // a terminal and a script may both pass it on
			s.exited(0)
			s.logged("stopped")
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
				t.Errorf("left behind: %v, %v", entries, err)
			}
		})
	}
}

// TestServePluginErrors says what is wrong with a command line, a file or a socket, and what to do.
func TestServePluginErrors(t *testing.T) {
	d, dir := clitest.NewDir(t), kmstest.SocketDir(t)
	good, path := d.Config(t), filepath.Join(dir, "kms.sock")
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	line := func(config, name, socket string, more ...string) []string {
		return append([]string{"kms", "serve-plugin", "--config", config, "--name", name, "--socket", socket}, more...)
	}
	for name, tc := range map[string]struct {
		args  []string
		code  int
		texts []string
	}{
		"no name":        {[]string{"kms", "serve-plugin", "--config", good, "--socket", path}, 2, []string{"error: --name is missing"}},
		"no socket":      {[]string{"kms", "serve-plugin", "--config", good, "--name", "dev"}, 2, []string{"error: --socket is missing"}},
		"no time":        {line(good, "dev", path, "--drain-timeout", "0s"), 2, []string{"--drain-timeout 0s"}},
		"argument":       {line(good, "dev", path, "more"), 2, []string{"error: "}},
		"no such name":   {line(good, "prod", path), 2, []string{`no KMS provider is called "prod"`, "hint: the configuration has dev"}},
		"no such file":   {line(d.Path("gone.yaml"), "dev", path), 3, []string{"gone.yaml"}},
		"relative":       {line(good, "dev", "kms.sock"), 3, []string{`socket "kms.sock"`, "/path/to/socket"}},
		"a regular file": {line(good, "dev", file), 3, []string{file, "not a socket", "left alone"}},
		"no folder":      {line(good, "dev", filepath.Join(dir, "gone", "s")), 3, []string{"does not exist", "hint: make the folder"}},
	} {
		t.Run(name, func(t *testing.T) { executeAlone(t, tc.args...).want(t, tc.code, tc.texts...) })
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "precious" {
		t.Errorf("the regular file: %q, %v", data, err)
	}
	itself := d.Config(t, "local: {keyFile: key.yaml}", "plugin: {endpoint: 'unix://"+path+"'}")
	executeAlone(t, line(itself, "dev", path)...).want(t, 2, "the socket that provider \"dev\" is itself reached at")
	none := d.Config(t, "kms:\n- name: dev\n  local: {keyFile: key.yaml}\nrules:\n- prefix: /registry/secrets/\n  writeWith: dev\n", "")
	executeAlone(t, line(none, "dev", path)...).want(t, 3, "error: no KMS is configured")
}

// TestServePluginTwice: a second server on one socket refuses; one that comes after a crash takes
// over, and the clients with it.
func TestServePluginTwice(t *testing.T) {
	d, path := clitest.NewDir(t), filepath.Join(kmstest.SocketDir(t), "kms.sock")
	config := d.Config(t)
	first := servePluginOn(t, config, "dev", path)
	executeAlone(t, "kms", "serve-plugin", "--config", config, "--name", "dev", "--socket", path).want(t, 3, "another process answers on it", "hint: ")
	k := pluginClient(t, path)
	if _, err := k.Status(t.Context()); err != nil {
		t.Errorf("the first one: %v", err)
	}
	first.signal(syscall.SIGKILL)
	<-first.done
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("this needs a stale socket: %v", err)
	}
	second := servePluginOn(t, config, "dev", path)
	clitest.Eventually(t, "answer of the second one", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := k.Status(ctx)
		return err == nil
	})
	second.signal(syscall.SIGTERM)
	second.exited(0)
}

// TestServePluginBesideProxy shares a configuration, whose admin address the proxy has.
func TestServePluginBesideProxy(t *testing.T) {
	d, path := clitest.NewDir(t), filepath.Join(kmstest.SocketDir(t), "kms.sock")
	s := servePluginOn(t, d.Config(t, `"127.0.0.1:0"`, clitest.Occupy(t)), "dev", path)
	s.logged("the admin address is in use")
	if _, err := pluginClient(t, path).Status(t.Context()); err != nil {
		t.Error(err)
	}
	// And without an admin block there is none.
	quiet := servePluginOn(t, d.Config(t, "admin: {address: \"127.0.0.1:0\"}\n", ""), "dev", path+"2")
	if strings.Contains(quiet.text(), "admin") {
		t.Errorf("log:\n%s", quiet.text())
	}
}

// TestServePluginWarnsOfItsFolder says so where others can replace the socket, not where the sticky
// bit keeps them from it.
func TestServePluginWarnsOfItsFolder(t *testing.T) {
	d := clitest.NewDir(t)
	for mode, want := range map[os.FileMode]bool{0o777: true, 0o720: true, 0o777 | os.ModeSticky: false, 0o755: false} {
		dir := kmstest.SocketDir(t)
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		s := servePluginOn(t, d.Config(t), "dev", filepath.Join(dir, "s"))
		if got := strings.Contains(s.text(), "other users may write into the socket's folder"); got != want {
			t.Errorf("mode %v: warned %v, want %v", mode, got, want)
		}
		s.signal(syscall.SIGTERM)
		s.exited(0)
	}
}

// TestServePluginAudit: the plugin's KMS calls are in the audit log of its configuration, and what
// must be recorded does not happen without it.
func TestServePluginAudit(t *testing.T) {
	d, path := clitest.NewDir(t), filepath.Join(kmstest.SocketDir(t), "kms.sock")
	const log = "audit.plugin-dev.jsonl" // audit.jsonl is the proxy's
	config := d.Config(t, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ")
	s := servePluginOn(t, config, "dev", path)
	k := pluginClient(t, path)
	encrypt := func() error {
		_, err := k.Encrypt(t.Context(), "uid", []byte(seedText))
		return err
	}
	if err := encrypt(); err != nil {
		t.Fatal(err)
	}
	execute(t, "kms", "serve-plugin", "--config", config, "--name", "dev", "--socket", path+"2").want(t, 3, "another process writes it", "hint: ", "audit.path")
	unblock := d.BlockAt(t, log)
	for range 2 { // the first one's record is lost; the second one is not made
		if err := encrypt(); err == nil || !strings.Contains(err.Error(), "Unavailable") {
			t.Errorf("without the log: %v", err)
		}
	}
	if code, page := get(t, s, "/readyz"); code != http.StatusOK || !strings.Contains(page, "[-]audit: the audit log cannot be written") {
		t.Errorf("readyz: %d %s", code, page)
	}
	if _, page := get(t, s, "/metrics"); !strings.Contains(page, "etcd_kms_proxy_audit_lost_total 1") || !strings.Contains(page, "etcd_kms_proxy_audit_writable 0") {
		t.Error("the metrics do not say so")
	}
	unblock()
	if err := encrypt(); err != nil {
		t.Error(err)
	}
	s.signal(syscall.SIGTERM)
	s.exited(0)
	count := map[string]int{}
	for _, r := range d.AuditLogAt(t, log) {
		count[fmt.Sprint(r["event"], " ", r["operation"], " ", r["class"])]++
	}
	if count["start <nil> <nil>"] != 1 || count["kms Encrypt ok"] != 2 || count["lost <nil> <nil>"] != 1 || count["stop <nil> <nil>"] != 1 || count["kms Status ok"] == 0 {
		t.Errorf("records: %v", count)
	}
	execute(t, "audit", "verify", d.Path(log)).want(t, 0)
	if _, err := os.Stat(d.Path("audit.jsonl")); !os.IsNotExist(err) {
		t.Errorf("the plugin has made the proxy's log: %v", err)
	}
}

// Package reload changes every file that a running proxy reads, in every way in which files are
// changed.
package reload

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const within = 30 * time.Second

// folder contains the files of a proxy, and says how they change.
type folder struct {
	t       *testing.T
	path    string
	style   string
	files   map[string]string // by name
	version int
}

// put changes files. Nil removes one.
func (f *folder) put(changes map[string]*string) {
	f.t.Helper()
	for name, text := range changes {
		if text == nil {
			delete(f.files, name)
		} else {
			f.files[name] = *text
		}
	}
	must := func(err error) {
		f.t.Helper()
		if err != nil {
			f.t.Fatal(err)
		}
	}
	if f.style == "..data" { // like a Secret mounted by Kubernetes
		f.version++
		folder := fmt.Sprintf("..version-%d", f.version)
		must(os.Mkdir(filepath.Join(f.path, folder), 0o700))
		for name, text := range f.files {
			must(os.WriteFile(filepath.Join(f.path, folder, name), []byte(text), 0o600))
			if _, err := os.Lstat(filepath.Join(f.path, name)); err != nil {
				must(os.Symlink(filepath.Join("..data", name), filepath.Join(f.path, name)))
			}
		}
		link := filepath.Join(f.path, "..data")
		must(os.Symlink(folder, link+".new"))
		must(os.Rename(link+".new", link))
		return
	}
	for name, text := range changes {
		path := filepath.Join(f.path, name)
		switch {
		case text == nil:
			must(os.Remove(path))
		case f.style == "renamed":
			must(os.WriteFile(path+".new", []byte(*text), 0o600))
			must(os.Rename(path+".new", path))
		default:
			must(os.WriteFile(path, []byte(*text), 0o600))
		}
	}
}

// subject is a file, or files that belong together.
type subject struct {
	name    string
	good    func(n int) map[string]string // different for each n
	bad     map[string]string
	missing string
	// What the log says, and the line of /readyz; "" for none.
	reloaded, back, refused, ready string
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestFiles changes each file of a configuration in every way. A good file must be used without a
// restart. A bad or missing file must leave the old one in use, which is logged once and shown in
// /readyz until there is a good one.
func TestFiles(t *testing.T) {
	for _, style := range []string{"in place", "renamed", "..data"} {
		t.Run(style, func(t *testing.T) {
			t.Parallel()
			testFiles(t, style)
		})
	}
}

func testFiles(t *testing.T, style string) {
	e := harness.New(t)
	ca := e.NewCA("ca")
	etcd := e.StartEtcd(harness.EtcdConfig{CA: ca})
	double := e.NewAlibaba()
	ack, local := e.AlibabaKey("ack", double), e.LocalKey("dev", 1)
	local.PollInterval = "1s"
	f := &folder{t: t, path: filepath.Join(e.Dir, "mount"), style: style, files: make(map[string]string)}
	if err := os.Mkdir(f.path, 0o700); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(f.path, name) }

	server, crl := ca.Server("first"), filepath.Join(e.Dir, "crl.pem")
	ca.Revoke(crl)
	initial := map[string]string{
		"tls.crt": read(t, server.CertFile), "tls.key": read(t, server.KeyFile), "ca.crt": read(t, ca.File), "crl.pem": read(t, crl),
		"etcd-ca.crt": read(t, ca.File), "etcd.crt": read(t, etcd.Client.CertFile), "etcd.key": read(t, etcd.Client.KeyFile),
		"password": "password", "kms-ca.crt": read(t, ack.Alibaba.CAFile),
		"id": read(t, ack.Alibaba.Credentials.AccessKeyIDFile), "secret": read(t, ack.Alibaba.Credentials.AccessKeySecretFile),
		"keys.yaml": read(t, local.Local.KeyFile), "kubernetes.yaml": "keys: [{name: key1, secret: MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=}]\n",
	}
	ack.Alibaba.CAFile, ack.Alibaba.Credentials.AccessKeyIDFile, ack.Alibaba.Credentials.AccessKeySecretFile = at("kms-ca.crt"), at("id"), at("secret")
	local.Local.KeyFile = at("keys.yaml")
	p := e.NewProxy("proxy", harness.ProxyConfig{
		Listeners: []harness.Listener{{Address: harness.FreeAddress(t), TLS: &harness.ServerTLS{
			CertFile: at("tls.crt"), KeyFile: at("tls.key"), ClientCAFile: at("ca.crt"), ClientCRLFile: at("crl.pem"),
		}}},
		Etcd: harness.Upstream{
			Endpoints: []string{etcd.URL}, TLS: &harness.ClientTLS{CAFile: at("etcd-ca.crt"), CertFile: at("etcd.crt"), KeyFile: at("etcd.key")},
			Username: "root", PasswordFile: at("password"),
		},
		KMS: []harness.KMSConfig{ack, local, {Name: "old", Kubernetes: &harness.KubernetesKeys{Type: "secretbox", KeyFile: at("kubernetes.yaml")}}},
		Rules: []harness.Rule{
			{Prefix: "/s/", WriteWith: "dev", ReadWith: []string{"old"}}, {Prefix: "/a/", WriteWith: "ack"},
		},
		Log: harness.LogConfig{Level: "info"},
	})
	initial["config.yaml"] = read(t, p.ConfigFile)
	p.ConfigFile = at("config.yaml")
	all := make(map[string]*string)
	for name, text := range initial {
		all[name] = &text
	}
	f.put(all)
	p.Start()
	p.WaitReady(within)

	// commented returns the file with a comment, which changes only its bytes.
	commented := func(name string) func(int) map[string]string {
		return func(n int) map[string]string {
			return map[string]string{name: initial[name] + strings.Repeat("\n", n)}
		}
	}
	half := func(name string) map[string]string {
		return map[string]string{name: initial[name][:len(initial[name])/2]}
	}
	const refused, taken, back = `"msg":"changed files cannot be used; the old ones stay in use"`, `"msg":"files reloaded"`, `"msg":"the files in use are back"`
	listener := func(line string) string { return line + `,"for":"listener ` + p.Address }
	toEtcd := func(line string) string { return line + `,"for":"etcd"` }
	kmsCA := func(line string) string { return line + `,"for":"the CA ` }
	password := func(line string) string { return line + `,"for":"etcd.passwordFile"` }
	config := func(n int) map[string]string {
		var c map[string]any
		if err := json.Unmarshal([]byte(initial["config.yaml"]), &c); err != nil {
			t.Fatal(err)
		}
		c["log"].(map[string]any)["level"] = []string{"info", "debug"}[n%2]
		data, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		return map[string]string{"config.yaml": string(data)}
	}
	subjects := []subject{
		{
			"the listener's certificate and key", func(n int) map[string]string {
				pair := ca.Server(fmt.Sprint("renewed-", n))
				return map[string]string{"tls.crt": read(t, pair.CertFile), "tls.key": read(t, pair.KeyFile)}
			}, map[string]string{"tls.crt": initial["tls.crt"], "tls.key": read(t, ca.Server("other").KeyFile)}, "tls.key",
			listener(taken), listener(taken), listener(refused), "TLS files of listener",
		},
		{"clientCAFile", commented("ca.crt"), half("ca.crt"), "ca.crt", listener(taken), listener(taken), listener(refused), "TLS files of listener"},
		{"clientCRLFile", commented("crl.pem"), half("crl.pem"), "crl.pem", listener(taken), listener(taken), listener(refused), "TLS files of listener"},
		{"etcd.tls.caFile", commented("etcd-ca.crt"), half("etcd-ca.crt"), "etcd-ca.crt", toEtcd(taken), toEtcd(taken), toEtcd(refused), "TLS files of etcd"},
		{"etcd.tls.certFile", commented("etcd.crt"), half("etcd.crt"), "etcd.key", toEtcd(taken), toEtcd(taken), toEtcd(refused), "TLS files of etcd"},
		{"etcd.passwordFile", commented("password"), map[string]string{"password": "\n"}, "password", password(taken), password(taken), password(refused), "etcd.passwordFile"},
		{"alibaba.caFile", commented("kms-ca.crt"), half("kms-ca.crt"), "kms-ca.crt", kmsCA(taken), kmsCA(taken), kmsCA(refused), "files of kms ack"},
		{
			"alibaba.credentials", commented("secret"), map[string]string{"secret": ""}, "id", "", `"msg":"alibaba credentials can be read again"`,
			`"msg":"alibaba credentials cannot be read, the last good ones stay in use"`, "",
		},
		{
			"local.keyFile", commented("keys.yaml"), half("keys.yaml"), "keys.yaml", `"msg":"key file has changed"`, `"msg":"KMS key is usable","provider":"dev"`,
			`"msg":"KMS health check failed","provider":"dev"`, "kms dev",
		},
		{
			"kubernetes.keyFile", commented("kubernetes.yaml"), half("kubernetes.yaml"), "kubernetes.yaml", `"msg":"key file reloaded","provider":"old"`,
			`"msg":"key file reloaded","provider":"old"`, `"msg":"changed key file cannot be used; the old keys stay in use"`, "key file of old",
		},
		{
			"the configuration", config, half("config.yaml"), "config.yaml", `"msg":"configuration reloaded"`, `"msg":"configuration reloaded"`,
			`"msg":"configuration not reloaded: the running one stays"`, "configuration",
		},
	}
	want := make(map[string]int) // log lines of refusals
	for _, s := range subjects {
		count := func(line string) int { return strings.Count(p.Log(), line) }
		put := func(files map[string]string) {
			t.Helper()
			changes := make(map[string]*string)
			for name, text := range maps.All(files) {
				changes[name] = &text
			}
			f.put(changes)
		}
		await := func(what, line string, n int) {
			t.Helper()
			harness.Eventually(t, within, s.name+", "+what+": "+line, func() error {
				if have := count(line); have < n {
					return fmt.Errorf("%d times, want %d", have, n)
				}
				return nil
			})
		}
		ready := func(what string, ok bool) {
			t.Helper()
			if s.ready == "" {
				return
			}
			harness.Eventually(t, within, s.name+", "+what+": /readyz", func() error {
				if report := p.Report(); strings.Contains(report, "[-]"+s.ready) == ok || !ok && !strings.HasPrefix(report, "200\n") {
					return fmt.Errorf("it says %s", report)
				}
				return nil
			})
		}
		before := count(s.refused)
		want[s.refused] += 2
		if s.reloaded != "" {
			taken := count(s.reloaded)
			put(s.good(1))
			await("good", s.reloaded, taken+1)
		}
		for n, what := range []string{"bad", "missing"} {
			if what == "bad" {
				put(s.bad)
			} else {
				f.put(map[string]*string{s.missing: nil})
			}
			await(what, s.refused, before+n+1)
			ready(what, false)
			again := count(s.back)
			files := s.good(n + 2)
			if _, ok := files[s.missing]; !ok {
				files[s.missing] = initial[s.missing]
			}
			put(files)
			await("good again", s.back, again+1)
			ready("good again", true)
		}
	}
	p.WaitReady(within)
	// A repeated line would have been logged during the turns of the other files.
	for line, n := range want {
		have := strings.Count(p.Log(), line)
		if strings.Contains(line, "listener") && style != "..data" && have == n+1 {
			continue // a certificate and its key were not replaced at the same moment
		}
		if have != n {
			t.Errorf("%s is logged %d times, want %d", line, have, n)
		}
	}
}

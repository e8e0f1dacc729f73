package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/encryption"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/server"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

var updateStored = flag.Bool("update-stored", false, "write the values of testdata/0.1.0 again, by this version: only before 0.1.0 is released")

// released is what the first release left: the configuration, the keys and stored values of every
// kind of provider. RELEASING.md promises that they can be read for ever, so these files never
// change. A later format gets a folder of its own.
const released = "testdata/0.1.0"

// storedValue is a value as etcd has it.
type storedValue struct {
	Name                       string
	EtcdKey, Plaintext, Stored []byte
}

// openReleased makes the keys of the released configuration. Without primary, no key but that of
// the recovery provider is there: the plugin and the KMS do not answer, and the key file has lost
// its versions.
func openReleased(t *testing.T, primary bool) *encryption.Keys {
	t.Helper()
	folder := t.TempDir()
	put := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(folder, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files, err := filepath.Glob(released + "/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		put(filepath.Base(f), data)
	}
	double := kmsdouble.New(t, kmsdouble.Config{Keys: []kmsdouble.KeyConfig{{
		ID: "key-0a1b2c3d4e5f6a7b8c9d0e", Version: "0a1b2c3d-4e5f-4a7b-8c9d-0e1f2a3b4c5d", Secret: [32]byte([]byte("0.1.0 key of Alibaba Cloud's KMS")),
	}}})
	socket := filepath.Join(folder, "kms.sock")
	endpoint := double.Endpoint()
	if primary {
		keys, err := local.New(local.Config{KeyFile: filepath.Join(folder, "plugin.yaml")})
		if err != nil {
			t.Fatal(err)
		}
		plugin := service.NewGRPCService(socket, time.Minute, keys)
		served := make(chan struct{})
		go func() { defer close(served); _ = plugin.ListenAndServe() }()
		t.Cleanup(func() { plugin.Shutdown(); <-served })
		clitest.Eventually(t, "the plugin", func() bool {
			conn, err := net.Dial("unix", socket)
			if err == nil {
				_ = conn.Close()
			}
			return err == nil
		})
	} else {
		endpoint = "127.0.0.1:1"
		put("dev.yaml", []byte("keys: [{id: other, secret: MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=}]\n"))
	}
	ca, err := os.ReadFile(double.CAFile())
	if err != nil {
		t.Fatal(err)
	}
	put("kms-ca.crt", ca)
	put("id", []byte(kmsdouble.DefaultAccessKeyID))
	put("secret", []byte(kmsdouble.DefaultAccessKeySecret))
	text, err := os.ReadFile(filepath.Join(folder, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	put("config.yaml", []byte(strings.NewReplacer("SOCKET", socket, "ENDPOINT", endpoint).Replace(string(text))))
	c, err := config.Load(filepath.Join(folder, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	a, err := encryption.New(encryption.Config{Config: c, Registry: prometheus.NewRegistry(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	running, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(running) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, ring := range a.Rings() {
		if err := ring.WaitForCheck(ctx); err != nil && primary {
			t.Fatalf("%s: %v", ring.Provider(), err)
		}
	}
	return a
}

// sealerOf is the rule's of a key.
func sealerOf(t *testing.T, a *encryption.Keys, key []byte) *rule.Sealer {
	t.Helper()
	rules := a.Rules()
	for i, rule := range rules.Config() {
		if strings.HasPrefix(string(key), rule.Prefix) {
			return rules.Sealers()[i]
		}
	}
	t.Fatalf("no rule for %s", key)
	return nil
}

// TestStoredValuesOfReleases decrypts what releases have stored: with the keys that it was
// encrypted with, and, where there is a recovery copy, with that alone.
func TestStoredValuesOfReleases(t *testing.T) {
	file := filepath.Join(released, "values.json")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var values []storedValue
	if err := json.Unmarshal(data, &values); err != nil {
		t.Fatal(err)
	}
	a := openReleased(t, true)
	if *updateStored {
		values = slices.DeleteFunc(values, func(v storedValue) bool { return !bytes.HasPrefix(v.EtcdKey, []byte("/registry/")) })
		for _, name := range []string{"dev", "plugin", "ack"} {
			v := storedValue{Name: name, EtcdKey: []byte("/" + name + "/key"), Plaintext: []byte("a value of 0.1.0 under " + name)}
			if v.Stored, err = sealerOf(t, a, v.EtcdKey).Seal(t.Context(), v.EtcdKey, v.Plaintext); err != nil {
				t.Fatal(err)
			}
			values = append(values, v)
		}
		if data, err = json.MarshalIndent(values, "", "\t"); err == nil {
			err = os.WriteFile(file, append(data, '\n'), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	names := make(map[string]bool)
	for _, v := range values {
		names[v.Name] = true
		if got, err := sealerOf(t, a, v.EtcdKey).Open(t.Context(), nil, v.EtcdKey, bytes.Clone(v.Stored)); err != nil || !bytes.Equal(got, v.Plaintext) {
			t.Errorf("%s: %q, %v", v.Name, got, err)
		}
	}
	for _, name := range []string{"dev", "plugin", "ack", "aescbc", "aesgcm", "secretbox"} {
		if !names[name] {
			t.Errorf("there is no value of %s", name)
		}
	}
	rescue := openReleased(t, false)
	for _, v := range values {
		if bytes.HasPrefix(v.EtcdKey, []byte("/registry/")) {
			continue // without recovery copies
		}
		if got, err := sealerOf(t, rescue, v.EtcdKey).Open(t.Context(), nil, v.EtcdKey, bytes.Clone(v.Stored)); err != nil || !bytes.Equal(got, v.Plaintext) {
			t.Errorf("%s, by its recovery copy: %q, %v", v.Name, got, err)
		}
	}
}

// TestSurfaceOfReleases: every command, flag and metric of 0.1.0 is still there, and metrics have
// the labels that they had.
func TestSurfaceOfReleases(t *testing.T) {
	now := make(map[string]bool)
	flag := regexp.MustCompile(`(?m)^ +(?:-\w, )?--([a-z0-9-]+)(?: (\w+))?  `)
	var commands func(c *cobra.Command)
	commands = func(c *cobra.Command) {
		now[c.CommandPath()] = true
		for _, m := range flag.FindAllStringSubmatch(c.LocalFlags().FlagUsages(), -1) {
			value := ""
			if m[2] != "" {
				value = " VALUE"
			}
			now[fmt.Sprintf("%s --%s%s", c.CommandPath(), m[1], value)] = true
		}
		for _, sub := range c.Commands() {
			commands(sub)
		}
	}
	commands(newRoot())
	path := clitest.NewDir(t).Config(t)
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	a, err := server.New(c, path, [32]byte{}, slog.New(slog.DiscardHandler), new(slog.LevelVar), server.Options{Drain: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	described := make(chan *prometheus.Desc, 1000)
	a.Registry().Describe(described)
	close(described)
	metric := regexp.MustCompile(`fqName: "(etcd_kms_proxy_\w+|grpc_server_\w+)".*variableLabels: (\{[^}]*\})`)
	for d := range described {
		if m := metric.FindStringSubmatch(d.String()); m != nil {
			now[m[1]+m[2]] = true
		}
	}
	file := filepath.Join(released, "surface.txt")
	if *updateStored {
		lines := slices.Sorted(maps.Keys(now))
		if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for line := range strings.Lines(string(data)) {
		lines++
		if line = strings.TrimSuffix(line, "\n"); !now[line] {
			t.Errorf("there is no %q any more", line)
		}
	}
	if lines < 100 {
		t.Errorf("only %d lines", lines)
	}
}

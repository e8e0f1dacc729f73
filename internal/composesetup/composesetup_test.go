package composesetup

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// environment gives what .env sets.
func environment(pairs ...string) func(string) string {
	return func(name string) string {
		for _, p := range pairs {
			if v, ok := strings.CutPrefix(p, name+"="); ok {
				return v
			}
		}
		return ""
	}
}

// files returns the contents of all files below dir.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		data, err := os.ReadFile(path)
		found[strings.TrimPrefix(path, dir+"/")] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestSetupCompose: a second run changes nothing, a run near the end of the certificates replaces
// these and no key, and each certificate is good for its use and for no other authority's.
func TestSetupCompose(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	if err := Run(dir, environment(), now); err != nil {
		t.Fatal(err)
	}
	first := files(t, dir)
	if err := Run(dir, environment("KMS=local"), now.Add(200*24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	for name, data := range files(t, dir) {
		if first[name] != data {
			t.Errorf("the second run changed %s", name)
		}
	}
	later := now.Add(300 * 24 * time.Hour)
	if err := Run(dir, environment(), later); err != nil {
		t.Fatal(err)
	}
	for name, data := range files(t, dir) {
		renewed := strings.HasSuffix(name, ".crt") && !strings.HasPrefix(name, "ca/") && !strings.HasSuffix(name, "ca.crt")
		if renewed != (first[name] != data) && !strings.HasSuffix(name, ".key") {
			t.Errorf("near the end of the certificates: %s changed: %t", name, first[name] != data)
		}
		if (strings.HasPrefix(name, "ca/") || strings.HasSuffix(name, "service-account.key") || strings.HasSuffix(name, "key.yaml")) && first[name] != data {
			t.Errorf("%s was replaced", name)
		}
	}
	for _, tt := range []struct {
		cert, ca, name string
		usage          x509.ExtKeyUsage
	}{
		{"etcd/etcd-1", "etcd/ca.crt", "etcd-1", x509.ExtKeyUsageServerAuth},
		{"etcd/etcd-2", "etcd/ca.crt", "etcd-2", x509.ExtKeyUsageClientAuth},
		{"etcd/etcd-3", "etcd/ca.crt", "127.0.0.1", x509.ExtKeyUsageServerAuth},
		{"proxy/etcd-client", "etcd/ca.crt", "", x509.ExtKeyUsageClientAuth},
		{"proxy/server", "client/ca.crt", "proxy-2", x509.ExtKeyUsageServerAuth},
		{"proxy/server", "kubernetes/etcd-ca.crt", "127.0.0.1", x509.ExtKeyUsageServerAuth},
		{"client/client", "proxy/client-ca.crt", "", x509.ExtKeyUsageClientAuth},
		{"kubernetes/etcd-client", "proxy/client-ca.crt", "", x509.ExtKeyUsageClientAuth},
		{"kubernetes/server", "client/kube-ca.crt", "127.0.0.1", x509.ExtKeyUsageServerAuth},
		{"client/kube-admin", "kubernetes/client-ca.crt", "", x509.ExtKeyUsageClientAuth},
	} {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, tt.cert+".crt"), filepath.Join(dir, tt.cert+".key"))
		if err != nil {
			t.Fatal(err)
		}
		for _, ca := range []string{"etcd", "proxy", "kubernetes"} {
			roots, file := x509.NewCertPool(), filepath.Join(dir, "ca", ca+".crt")
			data, err := os.ReadFile(file)
			if err != nil || !roots.AppendCertsFromPEM(data) {
				t.Fatal(file, err)
			}
			named, err := os.ReadFile(filepath.Join(dir, tt.ca))
			if err != nil {
				t.Fatal(err)
			}
			_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: tt.name, KeyUsages: []x509.ExtKeyUsage{tt.usage}, CurrentTime: later})
			if bytes.Equal(named, data) != (err == nil) {
				t.Errorf("%s by the authority %s: %v", tt.cert, ca, err)
			}
		}
	}
}

// TestSetupComposeConfiguration: what it writes is a configuration without problems, for each KMS.
func TestSetupComposeConfiguration(t *testing.T) {
	cloud := []string{"KMS=alibaba", "ALIBABA_KMS_REGION=cn-hangzhou", "ALIBABA_KMS_KEY_ID=key-a", "ALIBABA_CLOUD_ACCESS_KEY_ID=a", "ALIBABA_CLOUD_ACCESS_KEY_SECRET=b"}
	for _, tt := range []struct {
		name     string
		runs     [][]string // the environment of each run
		writes   string
		readWith []string
	}{
		{"local", [][]string{nil}, "local", nil},
		{"Alibaba Cloud", [][]string{cloud}, "alibaba", nil},
		{"Alibaba Cloud after local", [][]string{nil, cloud, cloud}, "alibaba", []string{"local"}},
		{"a dedicated instance", [][]string{append(cloud, "ALIBABA_KMS_ENDPOINT=kms-vpc.cn-hangzhou.aliyuncs.com", "ALIBABA_KMS_CREDENTIALS=ecsRAMRole")}, "alibaba", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, env := range tt.runs {
				if err := Run(dir, environment(env...), time.Now()); err != nil {
					t.Fatal(err)
				}
			}
			path := filepath.Join(dir, "proxy", "config.yaml")
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			// The folder of the audit log is the container's.
			if err := os.WriteFile(path, bytes.ReplaceAll(text, []byte("/var/log/etcd-kms-proxy"), []byte(dir)), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := config.Load(path)
			if err != nil {
				t.Fatal(err)
			}
			if r := c.Rules[0]; r.WriteWith != tt.writes || strings.Join(r.ReadWith, " ") != strings.Join(tt.readWith, " ") || r.AllowPlaintextReads {
				t.Errorf("the rule is %+v", r)
			}
		})
	}
}

// TestSetupComposeRefuses: each mistake is told with what to do, and changes nothing.
func TestSetupComposeRefuses(t *testing.T) {
	cloud := []string{"KMS=alibaba", "ALIBABA_KMS_REGION=cn-hangzhou", "ALIBABA_KMS_KEY_ID=key-a", "ALIBABA_KMS_CREDENTIALS=ecsRAMRole"}
	write := func(name, text string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			t.Helper()
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(name string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			t.Helper()
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, tt := range []struct {
		name       string
		before     []string // the environment of an earlier run; nil: there was none
		change     func(t *testing.T, dir string)
		env        []string
		later      time.Duration
		text, hint string
	}{
		{name: ".env is missing", before: cloud, text: "is .env missing?", hint: "alibaba.env.example"},
		{name: ".env is not filled in", env: []string{"KMS=alibaba"}, text: "ALIBABA_KMS_REGION, ALIBABA_KMS_KEY_ID, ALIBABA_CLOUD_ACCESS_KEY_ID, ALIBABA_CLOUD_ACCESS_KEY_SECRET", hint: ".env"},
		{name: "no token", env: []string{"KMS=alibaba", "ALIBABA_KMS_CREDENTIALS=sts"}, text: "ALIBABA_CLOUD_SECURITY_TOKEN", hint: ".env"},
		{name: "an unknown KMS", env: []string{"KMS=aws"}, text: `"aws"`, hint: "KMS=local or KMS=alibaba"},
		{name: "unknown credentials", env: append(cloud[:3:3], "ALIBABA_KMS_CREDENTIALS=oidc"), text: `"oidc"`, hint: "ecsRAMRole"},
		{name: "KMS is forgotten", env: cloud[1:], text: "KMS is local", hint: "KMS=alibaba"},
		{name: "quotes", env: append(cloud[:2:2], `ALIBABA_KMS_KEY_ID="key-a"`, cloud[3]), text: "ALIBABA_KMS_KEY_ID holds", hint: "without quotes"},
		{name: "the clock is behind", before: []string{}, later: -24 * time.Hour, text: "valid from", hint: "clock"},
		{name: "the clock is ahead", before: []string{}, later: 11 * 365 * 24 * time.Hour, text: "valid until", hint: "clock"},
		{name: "the local key is gone", before: []string{}, change: remove("proxy/key.yaml"), text: "etcd-2 has data", hint: "backup"},
		{name: "another authority's key", before: []string{}, change: write("ca/etcd.key", "none"), text: "not an authority and its key", hint: "remove the volumes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, now := t.TempDir(), time.Now()
			for _, member := range []string{"etcd-1", "etcd-2", "etcd-3"} {
				if err := os.Mkdir(filepath.Join(dir, member), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if tt.before != nil {
				if err := Run(dir, environment(tt.before...), now); err != nil {
					t.Fatal(err)
				}
				write("etcd-2/member-data", "x")(t, dir)
			}
			if tt.change != nil {
				tt.change(t, dir)
			}
			before := files(t, dir)
			err := Run(dir, environment(tt.env...), now.Add(tt.later))
			f, ok := errors.AsType[problem.Problem](err)
			if !ok || !strings.Contains(f.Error(), tt.text) || !strings.Contains(f.Hint, tt.hint) {
				t.Fatalf("got %v, %+v; want %q, and to do %q", err, f, tt.text, tt.hint)
			}
			for name, data := range files(t, dir) {
				if before[name] != data {
					t.Errorf("%s has changed", name)
				}
			}
		})
	}
}

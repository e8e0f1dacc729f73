package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// minimal is a file with nothing but what must be there.
const minimal = `apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
- address: 127.0.0.1:2379
etcd:
  endpoints: [http://127.0.0.1:2379]
`

func TestMinimalFileGetsItsDefaults(t *testing.T) {
	got, err := Load(write(t, minimal))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		APIVersion: APIVersion, Kind: Kind,
		Listeners: []Listener{{Address: "127.0.0.1:2379", Mode: "0600", Gateway: true}},
		Etcd:      Etcd{Endpoints: []string{"http://127.0.0.1:2379"}, MaxRequestBytes: 1572864},
		Cache: Cache{Seeds: 10000, TTL: 24 * time.Hour, ServeUnreachableFor: 24 * time.Hour, SealUnreachableFor: 24 * time.Hour,
			RevokeWithin: time.Minute},
		Coordination: Coordination{Enabled: true, Prefix: "/etcd-kms-proxy/", WatchBypass: true},
		Log:          Log{Level: "info", Format: "json"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestPartsGetTheirDefaults(t *testing.T) {
	got, err := Load(write(t, minimal+`
kms:
- name: dr
  plugin: {endpoint: unix:///run/kmsplugin/socket.sock}
rules:
- {prefix: "", writeWith: dr}
admin: {}
cache: {sealUnreachableFor: 0s}
`))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]KMS{{
		Name: "dr", PollInterval: time.Minute, SeedMaxAge: 168 * time.Hour, SeedMaxSeals: 1 << 32,
		Plugin: &Plugin{Endpoint: "unix:///run/kmsplugin/socket.sock", Timeout: 3 * time.Second},
	}}, got.KMS); diff != "" {
		t.Errorf("kms (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]Rule{{WriteWith: "dr", AllowPlaintextReads: true, OnUndecryptable: "error"}}, got.Rules); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(&Admin{Address: "127.0.0.1:9379"}, got.Admin); diff != "" {
		t.Errorf("admin (-want +got):\n%s", diff)
	}
	if got.Cache.SealUnreachableFor != 0 || got.Cache.TTL != 24*time.Hour {
		t.Errorf("cache = %+v: an explicit zero counts, and the rest keeps its defaults", got.Cache)
	}
}

// TestExampleLoads keeps the manual's example true, with the files that it names made in a folder
// of the test's own.
func TestExampleLoads(t *testing.T) {
	example, err := os.ReadFile("testdata/example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key := pair(t)
	for name, data := range map[string][]byte{
		"server.crt": cert, "server.key": key, "client-ca.crt": cert, "etcd-ca.crt": cert, "etcd-client.crt": cert, "etcd-client.key": key,
		"access-key-id": []byte("id"), "access-key-secret": []byte("secret"),
	} {
		put(t, filepath.Join(dir, name), data)
	}
	got, err := Load(write(t, strings.ReplaceAll(string(example), "/etc/etcd-kms-proxy", dir)))
	if err != nil {
		t.Fatal(err)
	}
	if m := got.Listeners[0].FileMode(); m != 0o600 {
		t.Errorf("mode = %o", m)
	}
	if got.KMS[0].Alibaba.EncryptionContext["cluster"] != "c1" || got.KMS[0].Alibaba.Credentials.Type != "accessKey" {
		t.Errorf("alibaba = %+v", got.KMS[0].Alibaba)
	}
}

func TestRelativeNamesCountFromTheFile(t *testing.T) {
	path := write(t, minimal+"kms: [{name: dev, local: {keyFile: ./dev-key.yaml}}]\n")
	want := filepath.Join(filepath.Dir(path), "dev-key.yaml")
	put(t, want, []byte("x"))
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.KMS[0].Local.KeyFile != want {
		t.Errorf("keyFile = %q, want %q", got.KMS[0].Local.KeyFile, want)
	}
}

func TestNumbersAreStringsAsWritten(t *testing.T) {
	got, err := Load(write(t, `apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners: [{address: "unix:///run/p.sock", mode: 0660}]
etcd: {endpoints: [http://127.0.0.1:2379]}
kms: [{name: 7, plugin: {endpoint: unix:///run/k.sock}}]
rules: [{prefix: 1.50, writeWith: "7"}]
`))
	if err != nil {
		t.Fatal(err)
	}
	if got.Listeners[0].FileMode() != 0o660 || got.KMS[0].Name != "7" || got.Rules[0].Prefix != "1.50" {
		t.Errorf("got %+v %+v %+v", got.Listeners, got.KMS, got.Rules)
	}
}

func TestLoadWithoutFile(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "missing.yaml"), t.TempDir()} {
		_, err := Load(path)
		if ps, ok := errors.AsType[Problems](err); err == nil || ok {
			t.Errorf("%s: err = %v, problems = %v; want an error of the file system", path, err, ps)
		}
	}
	big := write(t, strings.Repeat("#\n", maxFile/2+1))
	if _, err := Load(big); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("err = %v, want one about its size", err)
	}
}

// TestAllProblemsAtOnce also fixes how a problem reads.
func TestAllProblemsAtOnce(t *testing.T) {
	_, err := Load(write(t, `apiVersion: etcd-kms-proxy.io/v1
kind: ProxyConfiguration
listners: []
listeners:
- address: 10.0.0.1:2379
etcd:
  endpoints: [10.0.0.1:2379]
  maxRequestBytes: many
kms:
- name: a:b
  pollInterval: 1
rules:
- prefix: /a/
  writeWith: nobody
- prefix: /a/
  writeWith: plaintext
  readWith: [gone]
`))
	want := `line 1: apiVersion: is "etcd-kms-proxy.io/v1", which this version does not read (write etcd-kms-proxy.io/v1alpha1)
line 3: listners: unknown field (did you mean listeners?)
line 5: listeners[0]: other machines reach 10.0.0.1:2379, and every value would cross the network in plaintext (add tls with clientCAFile, listen on 127.0.0.1 or a unix socket, or write insecurePlaintext: true)
line 7: etcd.endpoints[0]: "10.0.0.1:2379" is not the URL of an etcd member (write https://host:port, http://host:port or unix:///path)
line 8: etcd.maxRequestBytes: "many" is not a whole number that fits
line 10: kms[0].name: "a:b" has a colon, which ends the name in every stored value (choose a name without one)
line 10: kms[0]: has no backend (give it exactly one of alibaba, plugin, local, kubernetes and age)
line 11: kms[0].pollInterval: "1" is not a duration such as 90s, 1m or 24h
line 14: rules[0].writeWith: no KMS provider is called "nobody" (define it under kms, or use plaintext or a:b)
line 15: rules[1].prefix: "/a/" is the prefix of rules[0] too (remove one of them)
line 17: rules[1].readWith[0]: no KMS provider is called "gone" (define it under kms, or use a:b)`
	if diff := cmp.Diff(want, text(err)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, ok := errors.AsType[Problems](err); !ok {
		t.Errorf("err is a %T, want Problems", err)
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// write puts a configuration in a folder of its own and returns its path.
func write(t testing.TB, data string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	put(t, path, []byte(data))
	return path
}

func put(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// pair makes a self-signed certificate and its key.
func pair(t testing.TB) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCRLSign | x509.KeyUsageCertSign, SubjectKeyId: []byte{1}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

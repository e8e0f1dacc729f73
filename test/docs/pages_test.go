package docs

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const within = 30 * time.Second

// site is a page with its own etcd. The plaintext of its values is the page's, so the search for
// secrets in outputs does not apply to it.
type site struct {
	*page
	etcd   *harness.Etcd
	raw    pb.KVClient
	proxy  *harness.Process
	listen string
}

func newSite(t *testing.T, name string) *site {
	t.Helper()
	env := harness.New(t)
	s := &site{page: open(t, env, name), etcd: env.StartEtcd(harness.EtcdConfig{Bare: true}), listen: harness.FreeAddress(t)}
	s.raw = pb.NewKVClient(harness.Dial(t, s.etcd.Address, nil))
	s.means("127.0.0.1:12379", s.listen)
	s.means("127.0.0.1:2379", s.etcd.Address)
	s.means("127.0.0.1:9379", harness.FreeAddress(t))
	s.means("/etc/etcd-kms-proxy/", env.Dir+"/")
	s.means("/var/log/etcd-kms-proxy/", env.Dir+"/")
	s.means("/var/lib/etcd", s.etcd.DataDir)
	return s
}

// configure writes the configuration of enable-encryption.md, which the other pages use too.
func (s *site) configure(change ...string) {
	s.t.Helper()
	enable := &page{t: s.t, name: "guides/enable-encryption.md", real: s.real}
	data, err := os.ReadFile(filepath.Join("..", "..", "docs", enable.name))
	if err != nil {
		s.t.Fatal(err)
	}
	enable.text = string(data)
	s.config = s.env.File("config.yaml", []byte(strings.NewReplacer(change...).Replace(enable.yaml(1))))
}

// newKey generates a key file, or adds a version to an existing one.
func (s *site) newKey(name string) {
	s.t.Helper()
	s.shell("etcd-kms-proxy kms new-local-key /etc/etcd-kms-proxy/" + name + ".yaml")
}

func (s *site) put(key, value string) {
	s.t.Helper()
	if _, err := s.raw.Put(s.t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
		s.t.Fatal(err)
	}
}

// serve starts a proxy and waits until it is announced and the proxies have agreed on rules.
func (s *site) serve(args ...string) {
	s.t.Helper()
	p := s.env.Spawn("proxy", append([]string{"serve", "--config", s.config}, args...)...)
	s.proxy = p
	s.t.Cleanup(func() { p.Stop(within) })
	harness.Eventually(s.t, within, "the proxy to be announced", func() error {
		if err := p.Alive(); err != nil {
			return err
		}
		if out := s.shell("etcd-kms-proxy status"); !strings.Contains(out, "  as here") {
			return fmt.Errorf("%s", out)
		}
		record, err := s.raw.Range(s.t.Context(), &pb.RangeRequest{Key: []byte("/etcd-kms-proxy/agreement"), CountOnly: true})
		if err != nil || record.Count == 0 {
			return fmt.Errorf("no record of the rules: %w", err)
		}
		return nil
	})
}

func secret(n int) (key, value string) {
	return fmt.Sprintf("/registry/secrets/default/s%d", n), fmt.Sprintf("plaintext-canary-%d", n)
}

func TestEnableNewCluster(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/enable-encryption.md")
	s.configure("writeWith: main", "writeWith: main\n  allowPlaintextReads: false")
	s.newKey("key")
	s.run(1)
	s.serve()
	s.run(2)
}

func TestEnableExistingCluster(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/enable-encryption.md")
	defer s.done()
	s.seen[1], s.seen[2] = true, true // TestEnableNewCluster
	s.configure()
	s.newKey("key")
	s.put(secret(1))
	s.put(secret(2))
	s.put(secret(3))
	s.run(3)
	s.serve()
	s.run(4)
}

// TestConfigure checks the page's configurations, too.
func TestConfigure(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/configure.md")
	defer s.done()
	s.run(1)
	s.means("unix:///run/etcd-kms-proxy/etcd.sock", "unix://"+filepath.Join(s.env.Dir, "etcd.sock"))
	s.means("https://10.0.0.1:2379", s.etcd.URL)
	text := strings.Replace(s.yaml(1), "  tls: {caFile: /etc/etcd/ca.crt, certFile: /etc/etcd/client.crt, keyFile: /etc/etcd/client.key}\n", "", 1)
	s.config = s.env.File("config.yaml", []byte(text))
	s.run(2)
	s.env.File("wrong.yaml", []byte(strings.Replace(text, "writeWith", "writeWiht", 1)))
	s.run(3)
}

func TestReencrypt(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/reencrypt.md")
	defer s.done()
	s.configure()
	s.newKey("key")
	for n := range 150 {
		s.put(secret(n))
	}
	s.run(1)
}

// TestVerify runs the blocks in the order of an operator: status and verify of a cluster that was
// just encrypted, purge, and verify of the files of a stopped member.
func TestVerify(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/verify-encryption.md")
	defer s.done()
	s.configure()
	s.newKey("key")
	for n := range 3 {
		s.put(secret(n + 1))
	}
	s.serve()
	s.shell("etcd-kms-proxy reencrypt")
	s.run(1)
	s.run(2)
	s.run(4)
	s.proxy.Stop(within)
	s.etcd.Stop(within)
	s.run(3)
}

func TestRotate(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/rotate-keys.md")
	defer s.done()
	s.configure()
	s.newKey("key")
	for n := range 3 {
		s.put(secret(n + 1))
	}
	s.shell("etcd-kms-proxy reencrypt")
	for n := range 3 {
		s.run(n + 1)
	}
}

func TestDisable(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/disable-encryption.md")
	defer s.done()
	s.configure()
	s.newKey("key")
	for n := range 3 {
		s.put(secret(n + 1))
	}
	s.serve()
	s.shell("etcd-kms-proxy reencrypt")
	s.proxy.Stop(within)
	s.configure("rules:\n- prefix: /registry/secrets/\n  writeWith: main\n", s.yaml(1))
	s.run(1)
	s.serve("--allow-weakening")
	s.run(2)
}

func TestRestoreBackup(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/restore-backup.md")
	defer s.done()
	s.configure()
	s.newKey("key")
	s.means("/backup/", s.env.Dir+"/")
	s.put(secret(1))
	s.put(secret(2))
	s.shell("etcd-kms-proxy reencrypt")
	s.shell("etcd-kms-proxy purge --yes")
	s.shell("etcdctl --endpoints 127.0.0.1:2379 snapshot save /backup/etcd.db")
	s.skip(2, "it serves until a signal; TestWorstDay restores all of it")
	s.skip(3, "it needs a recovery copy; test/recovery has that")
	s.etcd.Stop(within)
	if err := os.RemoveAll(s.etcd.DataDir); err != nil {
		t.Fatal(err)
	}
	s.run(1)
	s.etcd = s.env.StartEtcd(harness.EtcdConfig{Bare: true, Address: s.etcd.Address, Restored: s.etcd.DataDir})
	if out := s.shell("etcd-kms-proxy status"); !strings.Contains(out, " main         2     2        0      0") {
		t.Errorf("after the restore: %s", out)
	}
	s.etcd.Stop(within)
	s.run(4)
	s.newKey("key")
	s.run(5, "etcd-kms-proxy decrypt /registry") // asks on a terminal
}

func TestRestrictSettings(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/restrict-settings.md")
	defer s.done()
	s.configure()
	s.newKey("key")
	s.serve()
	s.proxy.Stop(within)
	s.configure("rules:\n- prefix: /registry/secrets/\n  writeWith: main\n", "")
	s.run(1)
	s.configure("admin:", "coordination: {enabled: false}\nadmin:")
	s.run(2)
}

func TestRecovery(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/recover-lost-key.md")
	defer s.done()
	s.configure("rules:", "- name: dr\n  local: {keyFile: dr.yaml}\n- name: new\n  local: {keyFile: new.yaml}\nrules:", "writeWith: main", "writeWith: main\n  recovery: [dr]")
	for _, name := range []string{"key", "dr", "new"} {
		s.newKey(name)
	}
	for n := range 40 {
		s.put(secret(n))
	}
	s.shell("etcd-kms-proxy reencrypt")
	s.run(9)
	s.shell("etcd-kms-proxy purge --yes")
	s.shell("etcdctl --endpoints 127.0.0.1:2379 snapshot save etcd.db")
	s.run(10)
	for n := 1; n <= 5; n++ {
		s.skip(n, "offline keys: test/recovery has them, with the passphrase, and runs the script")
	}
	s.skip(7, "it needs a KMS that has lost its key; test/recovery has that")
	s.skip(8, "TestLostKey")
}

// TestLostKey replaces the key file of a cluster without recovery copies.
func TestLostKey(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/recover-lost-key.md")
	s.configure()
	s.newKey("key")
	s.put(secret(1))
	s.serve()
	s.shell("etcd-kms-proxy reencrypt")
	s.proxy.Stop(within)
	if err := os.Remove(filepath.Join(s.env.Dir, "key.yaml")); err != nil {
		t.Fatal(err)
	}
	s.newKey("key")
	s.serve("--allow-weakening") // the lost key also encrypted the record of the rules
	s.run(8)
}

// aescbc encrypts as the API server does.
func aescbc(t *testing.T, key []byte, name, value string) string {
	t.Helper()
	b, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	iv := []byte("sixteen bytes IV")
	pad := aes.BlockSize - len(value)%aes.BlockSize
	out := []byte(value + strings.Repeat(string(rune(pad)), pad))
	cipher.NewCBCEncrypter(b, iv).CryptBlocks(out, out)
	return "k8s:enc:aescbc:v1:" + name + ":" + string(iv) + string(out)
}

func TestFromKubernetes(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/migrate-from-kubernetes.md")
	defer s.done()
	key := []byte("the key of the API server itself")
	s.means("/etc/kubernetes/", s.env.Dir+"/")
	s.env.File("encryption.yaml", []byte(strings.Replace(s.yaml(1), "secret: …", "secret: "+base64.StdEncoding.EncodeToString(key), 1)))
	for _, at := range []string{"/registry/secrets/default/db1", "/registry/secrets/default/db2", "/registry/secrets/default/db3", "/registry/configmaps/default/root-ca"} {
		s.put(at, aescbc(t, key, "key1", fmt.Sprintf(`{"apiVersion":"v1","kind":"Secret","metadata":{"name":%q,"namespace":"default"}}`, filepath.Base(at))))
	}
	s.config = filepath.Join(s.env.Dir, "config.yaml")
	s.run(1)
	s.newKey("key")
	made, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	s.env.File("config.yaml", []byte(strings.NewReplacer(
		"plugin: {endpoint: unix:///run/kmsplugin/REPLACE.sock}", "local: {keyFile: key.yaml}", "unix:///run/etcd-kms-proxy/etcd.sock", s.listen,
		"http://127.0.0.1:2379", s.etcd.URL, "127.0.0.1:9379", s.here("127.0.0.1:9379"),
	).Replace(string(made))))
	s.run(2)
	s.run(3, "systemctl", "kubectl")
	s.serve()
	s.run(4)
}

// TestAuditRecords verifies a log that has a key, as a proxy wrote it.
func TestAuditRecords(t *testing.T) {
	t.Parallel()
	s := newSite(t, "reference/audit-records.md")
	defer s.done()
	s.env.File("audit.key", []byte(strings.Repeat("k", 32)))
	s.configure("audit.jsonl}", "audit.jsonl, keyFile: audit.key}")
	s.newKey("key")
	s.serve()
	s.proxy.Stop(within)
	s.run(1)
	report := s.shell("etcd-kms-proxy audit verify --key-file audit.key audit.jsonl")
	_, last, ok := strings.Cut(report, "last hash")
	if !ok {
		t.Fatal(report)
	}
	s.means("d9bd66e8bde4c220279e5559dc42fb157faee6947f40cbfb8a3df387ea2b0748", strings.TrimSpace(last))
	s.run(2)
	s.skip(3, "it needs a log of several files; internal/auditlog has that")
}

// TestAlibabaCloud runs the blocks with a simulated KMS. The credentials are a session of an
// assumed role.
func TestAlibabaCloud(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/alibaba-cloud.md")
	defer s.done()
	kms := s.env.NewAlibaba()
	sts := kmsdouble.NewSTS(t, kmsdouble.STSConfig{Register: kms.SetAccessKey})
	for _, key := range []kmsdouble.KeyConfig{
		{ID: "key-bjj65f1cb66fa42qo7z8w"}, {ID: "key-default00000000000000", Default: true}, {ID: "key-careless0000000000000", Careless: true},
	} {
		if err := kms.AddKey(key); err != nil {
			t.Fatal(err)
		}
	}
	s.env.File("id", []byte(kmsdouble.DefaultAccessKeyID))
	s.env.File("secret", []byte(kmsdouble.DefaultAccessKeySecret))
	provider := func(name, key string) string {
		return fmt.Sprintf("- name: %s\n  alibaba:\n    {region: %s, keyID: %s, endpoint: %q, caFile: %s, credentials: {type: assumeRole, accessKeyIDFile: id, "+
			"accessKeySecretFile: secret, roleARN: %q, stsEndpoint: %q, stsCAFile: %s}}\n",
			name, kms.Region(), key, kms.Endpoint(), kms.CAFile(), kmsdouble.DefaultRoleARN, sts.Endpoint(), sts.CAFile())
	}
	dr, local := provider("dr", "key-bjj65f1cb66fa42qo7z8w"), s.here("- name: main\n  local: {keyFile: /etc/etcd-kms-proxy/key.yaml}\n")
	ack := provider("ack", kmsdouble.DefaultKeyID)
	s.configure(local, ack, "writeWith: main", "writeWith: ack")
	s.run(1)
	s.configure(local, ack+dr, "writeWith: main", "writeWith: ack\n  recovery: [dr]")
	s.run(2)
	s.configure(local, provider("ack", "key-default00000000000000")+dr, "writeWith: main", "writeWith: ack\n  recovery: [dr]")
	s.run(3)
	s.configure(local, provider("ack", "key-careless0000000000000")+dr, "writeWith: main", "writeWith: ack\n  recovery: [dr]")
	s.run(4)
}

func TestKubernetes(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/kubernetes.md")
	defer s.done()
	s.skip(5, "it serves until a signal; test/kubernetes starts it")
}

// TestEveryPage requires that each page with a console block that runs etcd-kms-proxy has a test
// here.
func TestEveryPage(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var source []byte
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		source = append(source, data...)
	}
	for _, name := range markdown(t) {
		below, ok := strings.CutPrefix(name, "docs/")
		if !ok || strings.Contains(string(source), fmt.Sprintf("newSite(t, %q)", below)) {
			continue
		}
		for _, b := range parse(readPage(t, name)) {
			for _, c := range b {
				if strings.HasPrefix(c.line, "etcd-kms-proxy ") {
					t.Errorf("%s: no test runs %q", name, c.line)
				}
			}
		}
	}
}

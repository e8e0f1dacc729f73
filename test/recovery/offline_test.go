package recovery

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/plugin"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// pluginName is the name of an age plugin that this test binary is, if it is called so.
const pluginName = "recoverytest"

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "age-plugin-"+pluginName {
		os.Exit(runPlugin())
	}
	os.Exit(m.Run())
}

// runPlugin is an age plugin whose identities contain X25519 identities.
func runPlugin() int {
	p, err := plugin.New(pluginName)
	if err != nil {
		return 1
	}
	p.HandleIdentity(func(data []byte) (age.Identity, error) { return age.ParseX25519Identity(string(data)) })
	os.Args = []string{os.Args[0], "--age-plugin=identity-v1"}
	return p.Main()
}

// offline is a recovery key whose private key only the test has.
type offline struct {
	identity *age.X25519Identity
	file     string
}

func newOffline(t *testing.T, s *site, name string) *offline {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	s.env.Sealed.Add("identity "+name, []byte(identity.String()))
	return &offline{identity, s.env.File(name+".txt", []byte("# made for a test\n"+identity.String()+"\n"))}
}

func offlineKMS(keys ...*offline) harness.KMSConfig {
	k := harness.KMSConfig{Name: "offline", Age: &harness.AgeKMS{}}
	for _, o := range keys {
		k.Age.Recipients = append(k.Age.Recipients, o.identity.Recipient().String())
	}
	return k
}

// seedOf returns the DEK seed of a stored value by its age copy, and adds it to the secrets that no
// log may contain.
func (s *site) seedOf(t *testing.T, key string, o *offline) []byte {
	t.Helper()
	r, err := s.raw.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})
	if err != nil || len(r.Kvs) != 1 {
		t.Fatalf("%s: %v", key, err)
	}
	_, object, _ := envelope.Split(r.Kvs[0].Value)
	parsed, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	d, err := age.Decrypt(bytes.NewReader(parsed.Annotations["offline.recovery.etcd-kms-proxy.io"]), o.identity)
	if err != nil {
		t.Fatal(err)
	}
	var seed bytes.Buffer
	if _, err := seed.ReadFrom(d); err != nil || seed.Len() != 32 {
		t.Fatalf("a seed of %d bytes, %v", seed.Len(), err)
	}
	s.env.Sealed.Add("seed", seed.Bytes())
	return seed.Bytes()
}

// command runs a command and checks its exit code.
func (s *site) command(t *testing.T, code int, args ...string) string {
	t.Helper()
	out, got := s.env.Run(args...)
	if got != code {
		t.Fatalf("%q: exit code %d, want %d: %s", args, got, code, out)
	}
	return out
}

// counts returns the counts of the rule that status reports.
func (s *site) counts(t *testing.T, config string, identities ...string) (current, stale, undecryptable, unavailable int64) {
	t.Helper()
	args := []string{"status", "--output", "json", "--config", config}
	for _, name := range identities {
		args = append(args, "--identity", name)
	}
	out, _ := s.env.Run(args...)
	var report struct {
		Rules []struct{ Current, Stale, Undecryptable, Unavailable int64 }
	}
	at := strings.Index(out, "{\n") // after what is on standard error
	if at < 0 || json.NewDecoder(strings.NewReader(out[at:])).Decode(&report) != nil || len(report.Rules) != 1 {
		t.Fatalf("status prints %s", out)
	}
	r := report.Rules[0]
	return r.Current, r.Stale, r.Undecryptable, r.Unavailable
}

// TestOfflineKey loses a cloud key when the only recovery key is offline. The proxy cannot decrypt
// the copies, and says what can. Commands with an identity decrypt every value, from etcd and from
// a snapshot, also if the key is disabled, and move everything to a new key.
func TestOfflineKey(t *testing.T) {
	s := newSite(t)
	double := s.env.NewAlibaba()
	safe, spare, stranger := newOffline(t, s, "safe"), newOffline(t, s, "spare"), newOffline(t, s, "stranger")
	ack, off, fresh := s.env.AlibabaKey("ack", double), offlineKMS(safe, spare), s.env.LocalKey("new", 2)
	rule := harness.Rule{WriteWith: "ack", Recovery: []string{"offline"}, RecoveryRequired: true}
	s.run(t, rule, ack, off)
	s.proxy.WaitReady(within)
	const n = 12
	s.fill(t, "a", n-1)
	// it is printed, so it must not be one that the harness searches for
	const shown = "decrypted in an emergency"
	if err := s.put(t, prefix+"shown", shown); err != nil {
		t.Fatal(err)
	}
	s.reads(t)
	if !bytes.Equal(s.seedOf(t, prefix+"shown", safe), s.seedOf(t, prefix+"shown", spare)) {
		t.Error("two recipients get two seeds")
	}
	if report := s.proxy.Report(); strings.Contains(report, "kms offline") || !strings.Contains(report, "[+]recovery of ack by offline ok") {
		t.Errorf("readyz says %s", report)
	}
	if strings.Contains(s.proxy.Scrape(), `etcd_kms_proxy_kms_healthy{provider="offline"}`) {
		t.Error("the metrics tell of the health of a key that cannot be polled")
	}
	config := s.proxy.ConfigFile

	// Tests of the key. Each with an identity is in the audit log.
	if out := s.command(t, 0, "kms", "check", "--config", config); !strings.Contains(out, "not tested with an identity") {
		t.Errorf("kms check: %s", out)
	}
	if out := s.command(t, 0, "kms", "check", "--config", config, "--identity", spare.file); !strings.Contains(out, "an identity unwrapped a recovery copy") {
		t.Errorf("kms check: %s", out)
	}
	if out := s.command(t, 1, "kms", "check", "--config", config, "--identity", stranger.file); !strings.Contains(out, "made for other recipients") {
		t.Errorf("kms check: %s", out)
	}
	log, err := os.ReadFile(s.commandsPath())
	if err != nil || strings.Count(string(log), `"command":"kms check"`) != 2 || !strings.Contains(string(log), "an identity unwrapped") {
		t.Errorf("the audit log does not say when the key was tested: %v\n%s", err, log)
	}
	if current, _, _, _ := s.counts(t, config); current != n {
		t.Errorf("%d values are current", current)
	}

	// Other recipients make the values stale.
	changed := s.env.NewProxy("changed", harness.ProxyConfig{
		Etcd: s.proxy.Config.Etcd, KMS: []harness.KMSConfig{ack, offlineKMS(safe)}, Rules: s.proxy.Config.Rules, Audit: s.proxy.Config.Audit,
	})
	if _, stale, _, _ := s.counts(t, changed.ConfigFile); stale != n {
		t.Errorf("%d values are stale after a recipient is removed", stale)
	}

	snapshot := s.etcd.Snapshot("saved.db")
	if !s.proxy.Stop(within) {
		t.Fatal("the proxy does not end")
	}

	// A disabled key: the operator who has an identity decides.
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
	if current, stale, undecryptable, unavailable := s.counts(t, config); current+stale != 0 || undecryptable+unavailable != n {
		t.Errorf("with a disabled key: %d, %d, %d, %d", current, stale, undecryptable, unavailable)
	}
	if _, stale, _, _ := s.counts(t, config, safe.file); stale != n {
		t.Errorf("with a disabled key and an identity, %d values decrypt", stale)
	}
	double.RemoveKey(kmsdouble.DefaultKeyID)

	// A key that is gone.
	if _, _, undecryptable, _ := s.counts(t, config); undecryptable != n {
		t.Errorf("without an identity, %d values are undecryptable", undecryptable)
	}
	if out, code := s.env.Run("status", "--list", "--config", config); code != 1 || !strings.Contains(out, "take them with --identity") {
		t.Errorf("status does not say what would decrypt the values: %s", out)
	}
	if _, _, undecryptable, _ := s.counts(t, config, stranger.file); undecryptable != n {
		t.Errorf("with another identity, %d values are undecryptable", undecryptable)
	}
	for name, files := range map[string][]string{
		"one": {safe.file}, "the other": {spare.file}, "several": {stranger.file, spare.file}, "a plugin": {s.pluginFile(t, spare)},
	} {
		if _, stale, _, _ := s.counts(t, config, files...); stale != n {
			t.Errorf("%s: %d values decrypt", name, stale)
		}
	}
	protected, passphrase := s.protectedFile(t, safe)
	if out := s.command(t, 3, "status", "--config", config, "--identity", protected); !strings.Contains(out, "no terminal") || !strings.Contains(out, "hint: ") {
		t.Errorf("without a terminal: %s", out)
	}
	if out := s.onTerminal(t, passphrase, "decrypt", "--yes", prefix+"shown", "--config", config, "--identity", protected); !strings.Contains(out, shown) {
		t.Errorf("with a passphrase: %s", out)
	}
	if out := s.onTerminal(t, "wrong"+passphrase, "decrypt", "--yes", prefix+"shown", "--config", config, "--identity", protected); strings.Contains(out, shown) || !strings.Contains(out, "passphrase is wrong") {
		t.Errorf("with a wrong passphrase: %s", out)
	}
	for _, from := range [][]string{nil, {"--snapshot", snapshot}} {
		with := append([]string{"--config", config, "--identity", safe.file}, from...)
		s.command(t, 0, append([]string{"verify"}, with...)...)
		if out := s.command(t, 0, append([]string{"decrypt", "--yes", prefix + "shown"}, with...)...); !strings.HasSuffix(out, shown) {
			t.Errorf("decrypt %q prints %q", from, out)
		}
	}
	if got := s.recoveriesIn(t, s.commandsPath())["ack by offline"]; got == 0 {
		t.Error("the audit log has no use of the copies")
	}
	s.lastResort(t, snapshot, safe, shown)
	s.lostConfiguration(t, snapshot, safe, shown)

	// To a new key. No identity is needed after that.
	s.run(t, harness.Rule{WriteWith: "new", ReadWith: []string{"ack"}, Recovery: []string{"offline"}}, ack, offlineKMS(spare), fresh)
	config = s.proxy.ConfigFile
	s.command(t, 1, "reencrypt", "--config", config)
	if out := s.command(t, 0, "reencrypt", "--config", config, "--identity", safe.file); !strings.Contains(out, fmt.Sprintf("%d rewritten", n)) {
		t.Errorf("reencrypt: %s", out)
	}
	if current, _, _, _ := s.counts(t, config); current != n {
		t.Errorf("%d values are current", current)
	}
	for key := range s.want {
		if provider, by := s.copies(t, key); provider != "new" || !slices.Equal(by, []string{"offline"}) {
			t.Errorf("%s is encrypted by %s with copies by %v", key, provider, by)
		}
	}
	// The record of the rules is encrypted under the lost key too: the proxy starts without its
	// verification.
	harness.Eventually(t, within, "the proxy to serve", func() error {
		if report := s.proxy.Report(); !strings.Contains(report, "[+]agreement") {
			return fmt.Errorf("readyz says %s", report)
		}
		return nil
	})
	s.reads(t)
	s.fill(t, "b", 2)
	s.reads(t)
	s.seedOf(t, prefix+"shown", spare)
	if out, code := s.env.Run("audit", "verify", s.commandsPath()); code != 0 {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// pluginFile returns an identity file of an age plugin that has o's identity, with the plugin in
// PATH.
func (s *site) pluginFile(t *testing.T, o *offline) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.env.Dir, "plugins")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, "age-plugin-"+pluginName)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	text := plugin.EncodeIdentity(pluginName, []byte(o.identity.String()))
	s.env.Sealed.Add("identity of the plugin", []byte(text))
	return s.env.File("plugin.txt", []byte(text+"\n"))
}

// protectedFile returns an identity file that a passphrase protects.
func (s *site) protectedFile(t *testing.T, o *offline) (file, passphrase string) {
	t.Helper()
	passphrase = s.env.Sealed.Value("passphrase")
	r, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	r.SetWorkFactor(12)
	var b bytes.Buffer
	w, err := age.Encrypt(&b, r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintln(w, o.identity); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return s.env.File("protected.age", b.Bytes()), passphrase
}

// lostConfiguration decrypts a snapshot with the identity, and with a configuration that is made
// from the names in the snapshot as the documentation says.
func (s *site) lostConfiguration(t *testing.T, snapshot string, o *offline, want string) {
	t.Helper()
	names := func(command string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "sh", "-c", command, "sh", snapshot).Output()
		if err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		return string(out)
	}
	if got := names(`grep -aoE 'k8s:enc:kms:v2:[^:]+' "$1" | sort -u`); got != "k8s:enc:kms:v2:ack\n" {
		t.Errorf("the providers are %q", got)
	}
	if got := names(`grep -aoE '[a-z0-9.-]+\.recovery\.etcd-kms-proxy\.io' "$1" | sort -u`); got != "offline.recovery.etcd-kms-proxy.io\n" {
		t.Errorf("the offline keys are %q", got)
	}
	placeholder := s.env.LocalKey("ack", 1)
	p := s.env.NewProxy("again", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{"http://127.0.0.1:1"}}, KMS: []harness.KMSConfig{placeholder, offlineKMS(o)},
		Rules: []harness.Rule{{Prefix: "/", WriteWith: "ack", Recovery: []string{"offline"}}},
	})
	with := []string{"--config", p.ConfigFile, "--snapshot", snapshot, "--identity", o.file}
	s.command(t, 0, append([]string{"verify"}, with...)...)
	args := append([]string{"decrypt", "--yes", prefix + "shown", "--audit-file", filepath.Join(s.env.Dir, "again.jsonl")}, with...)
	if out := s.command(t, 0, args...); !strings.HasSuffix(out, want) {
		t.Errorf("decrypt prints %q", out)
	}
}

// lastResort runs the script in the documentation, which decrypts a value with the programs age and
// python3 of Debian and without this software.
func (s *site) lastResort(t *testing.T, snapshot string, o *offline, want string) {
	t.Helper()
	for _, program := range []string{"age", "/usr/bin/python3"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("apt-get install age python3-cryptography: %v", err)
			}
			t.Logf("not tried: %v", err)
			return
		}
	}
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "guides", "recover-lost-key.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(page), "```python\n")
	script, _, closed := strings.Cut(after, "```\n")
	if !ok || !closed {
		t.Fatal("the page has no script")
	}
	r, err := s.raw.Range(t.Context(), &pb.RangeRequest{Key: []byte(prefix + "shown")})
	if err != nil || len(r.Kvs) != 1 {
		t.Fatal(err)
	}
	// as etcdctl get -w json
	stored, err := json.Marshal(map[string]any{"kvs": []any{map[string]any{"key": r.Kvs[0].Key, "value": r.Kvs[0].Value}}})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/usr/bin/python3", s.env.File("decrypt-value.py", []byte(script)), "offline", o.file)
	cmd.Stdin = bytes.NewReader(stored)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if out, err := cmd.Output(); err != nil || string(out) != want {
		t.Errorf("the script prints %q, %v: %s", out, err, &stderr)
	}
}

// TestOfflineKeyAfterKeyFileIsLost replaces the key file of the primary key by another one with the
// same key IDs. It also changes the recipients file of a running proxy, which new values follow.
func TestOfflineKeyAfterKeyFileIsLost(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	safe, next := newOffline(t, s, "safe"), newOffline(t, s, "next")
	main, off := s.env.LocalKey("main", 1), harness.KMSConfig{Name: "offline", Age: &harness.AgeKMS{}}
	recipients := func(o *offline) []byte { return []byte("# the safe\n" + o.identity.Recipient().String() + "\n") }
	off.Age.RecipientsFile = s.env.File("recipients.txt", recipients(safe))
	s.run(t, harness.Rule{WriteWith: "main", Recovery: []string{"offline"}, RecoveryRequired: true}, main, off)
	s.proxy.WaitReady(within)
	s.fill(t, "a", 5)
	first := s.seedOf(t, prefix+"a0", safe)

	// A bad file changes nothing.
	s.env.File("recipients.txt", []byte(safe.identity.Recipient().String()[:20]))
	s.says(t, "[-]recipients file of offline: the old one stays in use: ", `etcd_kms_proxy_recovery_missing{provider="main",recovery_provider="offline"} 0`)
	s.fill(t, "b", 1)
	if !bytes.Equal(s.seedOf(t, prefix+"b0", safe), first) {
		t.Error("a bad recipients file changes the seed")
	}
	s.env.File("recipients.txt", recipients(next))
	harness.Eventually(t, within, "a seed for the new recipient", func() error {
		if n := strings.Count(s.proxy.Log(), `"DEK seed generated"`); n != 2 {
			return fmt.Errorf("%d seeds", n)
		}
		return nil
	})
	s.fill(t, "c", 5)
	s.seedOf(t, prefix+"c0", next)
	if current, stale, _, _ := s.counts(t, s.proxy.ConfigFile); current != 5 || stale != 6 {
		t.Errorf("%d values are current and %d stale", current, stale)
	}
	s.command(t, 0, "reencrypt", "--config", s.proxy.ConfigFile)
	if current, _, _, _ := s.counts(t, s.proxy.ConfigFile); current != 11 {
		t.Errorf("%d values are current", current)
	}
	s.proxy.Stop(within)

	if err := os.Remove(main.Local.KeyFile); err != nil {
		t.Fatal(err)
	}
	s.command(t, 0, "kms", "new-local-key", main.Local.KeyFile)
	config := s.proxy.ConfigFile
	if current, stale, _, _ := s.counts(t, config); current+stale != 0 {
		t.Errorf("another key decrypts %d and %d values", current, stale)
	}
	if _, stale, _, _ := s.counts(t, config, safe.file); stale != 0 {
		t.Errorf("the identity of a former recipient decrypts %d values", stale)
	}
	if _, stale, _, _ := s.counts(t, config, next.file); stale != 11 {
		t.Errorf("the identity decrypts %d values", stale)
	}
	// etcd's history has values from before the change of recipients.
	s.command(t, 1, "verify", "--config", config, "--identity", next.file)
	s.command(t, 0, "verify", "--config", config, "--identity", next.file, "--identity", safe.file)
}

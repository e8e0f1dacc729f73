package lifecycle

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestPrintedTextIsQuoted checks that text chosen by others (key IDs, etcd keys and names in
// values) can neither forge a line of a report nor control the terminal.
func TestPrintedTextIsQuoted(t *testing.T) {
	t.Parallel()
	var kms *harness.KMS
	s := newSite(t, "3.7", func(c *harness.ProxyConfig) {
		kms = harness.New(t).NewKMS("plugin")
		kms.IDSuffix = "\ncurrent   main   1   999\x1b[31m\u009b31m\u202e"
		kms.Start()
		c.KMS = append(c.KMS, kms.Config("plugin"))
		c.Rules = append(c.Rules, harness.Rule{Prefix: "/registry/configmaps/", WriteWith: "plugin"})
	})
	const forged = "\ncurrent forged\x1b[31m\u009b"
	put(t, s.kv, "/registry/configmaps/a", "v")
	put(t, s.raw, prefix+"plain"+forged, mark)
	put(t, s.raw, prefix+"foreign"+forged, "k8s:enc:kms:v2:evil"+forged+":junk")
	put(t, s.raw, prefix+"legacy"+forged, "k8s:enc:aescbc:v1:evil"+forged+":"+strings.Repeat("\xff", 32))
	put(t, s.raw, prefix+"damaged"+forged, "k8s:enc:kms:v2:dev:junk")
	for _, c := range []struct {
		command string
		code    int
	}{
		{"status", 1}, {"status --list", 1}, {"kms check", 0}, {"reencrypt --dry-run", 1}, {"verify", 1}, {"purge --yes", 3}, {"decrypt --yes " + prefix + "none\x1b", 3},
		{"decrypt --yes --prefix " + prefix, 1}, {"audit verify " + s.audit, 0}, {"status --list --output json", 1}, {"reencrypt", 1},
	} {
		args := strings.Fields(c.command)
		if args[0] != "audit" {
			args = append(args, "--config", s.proxy.ConfigFile)
		}
		out, code := s.Run(args...)
		if code != c.code {
			t.Errorf("%s: exit code %d, want %d\n%s", c.command, code, c.code, out)
		}
		checkPrinted(t, c.command, out)
	}
	out := s.run(t, 1, "status")
	if want := strconv.Quote(kms.KeyID()); strings.Count(out, want) != 2 {
		t.Errorf("%s does not stand twice in\n%s", want, out)
	}
	checkPrinted(t, "the proxy's log", s.proxy.Log())
}

func checkPrinted(t *testing.T, what, text string) {
	t.Helper()
	special := func(r rune) bool { return r != '\n' && r != '\t' && !strconv.IsPrint(r) }
	if !utf8.ValidString(text) || strings.ContainsFunc(text, special) {
		t.Errorf("%s has characters that are not printable: %q", what, text)
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "current") {
			t.Errorf("%s has a forged line: %q", what, text)
		}
	}
}

// TestKeysWithColons checks that names of the API server's keys that contain colons are complete
// everywhere, also that of a missing key.
func TestKeysWithColons(t *testing.T) {
	t.Parallel()
	const first, second = "aescbckey-2025-12-27T23:41:02+08:00", "aescbckey-2025-12-27T23:59:30+08:00"
	secrets := map[string][]byte{first: bytes.Repeat([]byte{1}, 32), second: bytes.Repeat([]byte{2}, 32)}
	keys := func(names ...string) string {
		text := "keys:\n"
		for _, name := range names {
			text += fmt.Sprintf("- {name: %q, secret: %s}\n", name, base64.StdEncoding.EncodeToString(secrets[name]))
		}
		return text
	}
	s := newSite(t, "3.7", nil)
	for i, name := range []string{first, second, second} {
		namespace := fmt.Sprintf("n%d", i)
		put(t, s.raw, prefix+namespace+"/obj", string(aescbc(t, name, secrets[name], objectAt(namespace))))
	}
	config := func(names ...string) string {
		s.File("old.yaml", []byte(keys(names...)))
		return s.File("with-old.yaml", fmt.Appendf(nil, "apiVersion: etcd-kms-proxy.io/v1alpha1\nkind: ProxyConfiguration\nlisteners: [{address: %q}]\netcd: {endpoints: [%s]}\nkms:\n"+
			"- {name: dev, local: {keyFile: %s}}\n- {name: old, kubernetes: {type: aescbc, keyFile: old.yaml}}\nrules: [{prefix: %s, writeWith: dev, readWith: [old]}]\n",
			"unix://"+filepath.Join(s.Dir, "unused.sock"), s.etcd.URL, s.proxy.Config.KMS[0].Local.KeyFile, prefix))
	}
	status := func(path string, wants ...string) {
		t.Helper()
		out, code := s.Run("status", "--list", "--config", path)
		if code != 1 {
			t.Errorf("exit code %d", code)
		}
		for _, w := range wants {
			if !strings.Contains(out, w) {
				t.Errorf("there is no %q in\n%s", w, out)
			}
		}
	}
	row := func(state, name string, n int) string {
		return fmt.Sprintf("%s  aescbc        %s  %d ", state, name, n)
	}
	status(config(first, second), row("stale", first, 1), row("stale", second, 2))
	status(config(first), first+"  1 ", second+"  2 ", `it was encrypted with aescbc key "`+second+`"`)
}

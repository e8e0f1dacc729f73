package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

func TestHelp(t *testing.T) {
	for _, line := range []string{
		"--help", "help", "serve --help", "config --help", "config check --help", "kms --help", "kms check --help", "kms new-local-key --help",
		"version --help", "completion --help", "completion bash", "completion zsh", "completion fish",
	} {
		r := execute(t, strings.Fields(line)...)
		if r.code != 0 || r.stdout == "" || r.stderr != "" {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q; want help on stdout alone", line, r.code, r.stdout, r.stderr)
		}
	}
	help := execute(t, "--help").stdout
	for _, text := range []string{"serve", "config", "kms", "version", "completion", "Exit codes:", "  1  ", "  2  ", "  3  "} {
		if !strings.Contains(help, text) {
			t.Errorf("--help has no %q", text)
		}
	}
	if strings.Count(help, "etcd-kms-proxy COMMAND") != 2 || strings.Contains(help, "[command]") {
		t.Errorf("--help shows the use of the program twice: %s", help)
	}
	if flag, command := execute(t, "--version").stdout, execute(t, "version").stdout; flag != command || !strings.HasPrefix(flag, "etcd-kms-proxy ") {
		t.Errorf("--version prints %q, and version %q", flag, command)
	}
	execute(t, "stattus").want(t, 2, `error: unknown command "stattus"`, "hint: did you mean status?")
	execute(t, "kms", "chek").want(t, 2, "hint: did you mean check?")
	execute(t, "frobnicate").want(t, 2, "hint: etcd-kms-proxy --help lists the commands")
}

// TestHelpListsExitCodes: the help of every command lists the codes that it exits with, and says
// what 1 means.
func TestHelpListsExitCodes(t *testing.T) {
	known := 0
	var walk func(path []string)
	walk = func(path []string) {
		help := execute(t, append(path, "--help")...).stdout
		want := []string{"Exit codes:\n  0  all is well\n", "\n  2  the command line is wrong\n  3  the command failed\n"}
		if text, ok := findings[strings.Join(append([]string{""}, path...), " ")]; ok {
			known++
			want = append(want, "\n  1  "+text+"\n")
		}
		for _, text := range want {
			if strings.Count(help, text) != 1 {
				t.Errorf("%q has not %q once in its help:\n%s", path, text, help)
			}
		}
		_, rest, found := strings.Cut(help, "Available Commands:\n")
		if !found {
			return
		}
		list, _, _ := strings.Cut(rest, "\n\n")
		for line := range strings.Lines(list) {
			if name := strings.Fields(line)[0]; name != "help" {
				walk(append(slices.Clone(path), name))
			}
		}
	}
	walk(nil)
	if known != len(findings) {
		t.Errorf("%d of %d commands with findings exist", known, len(findings))
	}
}

// TestKMSCheckStrict: a key that works is 0, whatever there is to warn of, and 1 with --strict.
func TestKMSCheckStrict(t *testing.T) {
	path := clitest.NewDir(t).Config(t, "local: {keyFile: key.yaml}", "plugin: {endpoint: "+kmstest.PluginServer(t, kmstest.NewMemory())+"}")
	for _, c := range []struct {
		flags []string
		code  int
		ok    bool
	}{{nil, 0, true}, {[]string{"--strict"}, 1, false}} {
		r := execute(t, append([]string{"kms", "check", "--config", path, "--output", "json"}, c.flags...)...)
		var report struct {
			OK  bool             `json:"ok"`
			KMS []providerReport `json:"kms"`
		}
		if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || r.code != c.code || report.OK != c.ok || !report.KMS[0].OK || len(report.KMS[0].Warnings) != 1 {
			t.Errorf("%q: %+v, %v", c.flags, r, err)
		}
		r = execute(t, append([]string{"kms", "check", "--config", path}, c.flags...)...)
		if r.code != c.code || !strings.Contains(r.stdout, "(plugin): ok\n") || !strings.Contains(r.stdout, "  - warning: ") {
			t.Errorf("%q: %+v", c.flags, r)
		}
	}
}

// full is a standard output on a disk without room.
type full struct{}

func (full) Write([]byte) (int, error) {
	return 0, &fs.PathError{Op: "write", Path: "/dev/stdout", Err: syscall.ENOSPC}
}

// TestReportLost: a report that could not be written is a failure, in either form.
func TestReportLost(t *testing.T) {
	d := clitest.NewDir(t)
	for _, line := range []string{"version", "version --output json", "kms check --config " + d.Config(t), "completion bash"} {
		var stderr bytes.Buffer
		if code := run(strings.Fields(line), full{}, &stderr); code != 3 || stderr.String() != "error: write /dev/stdout: no space left on device\n" {
			t.Errorf("%s: exit code %d, stderr %q; want 3 and the reason", line, code, stderr.String())
		}
	}
}

// TestBadInput is what each bad input says, in config check and at the start of serve.
func TestBadInput(t *testing.T) {
	tests := map[string]struct {
		edits []string
		check int // exit code of config check; serve's is 3 in any case
		texts []string
	}{
		"unknown field":    {[]string{"writeWith", "writeWit"}, 1, []string{"line 12: rules[0].writeWit: unknown field", "hint: did you mean writeWith?"}},
		"duplicate field":  {[]string{"kind: ", "kind: x\nkind: "}, 1, []string{"line 3: kind: is given twice, first on line 2"}},
		"missing key file": {[]string{"key.yaml", "gone.yaml"}, 1, []string{"kms[0].local.keyFile", "gone.yaml: no such file", "hint: "}},
		"key file for all": {[]string{"key.yaml", "open.yaml"}, 1, []string{"line 9: kms[0].local.keyFile: key file ", "open.yaml: users other than its owner can use it (mode 0644)\nhint: run chmod 600 "}},
		"key file for all, and more": {[]string{"key.yaml", "open.yaml", "admin:", "rulez: []\nadmin:"}, 1, []string{
			"line 9: kms[0].local.keyFile: key file ", "hint: run chmod 600 ", "line 13: rulez: unknown field\nhint: did you mean rules?"}},
		"audit key for all":   {[]string{"kind: ", "audit: {path: audit.jsonl, keyFile: open.yaml}\nkind: "}, 1, []string{"line 2: audit.keyFile: audit key ", "hint: run chmod 600 "}},
		"key file of nothing": {[]string{"key.yaml", "config.yaml"}, 1, []string{"line 9: kms[0].local.keyFile: key file ", "hint: etcd-kms-proxy kms new-local-key makes"}},
		"no session": {[]string{"local: {keyFile: key.yaml}", "alibaba: {region: cn-hangzhou, keyID: key-a, credentials: {type: sts}}"}, 1, []string{
			"line 9: kms[0].alibaba.credentials: no access key ID\nhint: name a file, or set ALIBABA_CLOUD_ACCESS_KEY_ID\n",
			"line 9: kms[0].alibaba.credentials: no access key secret\nhint: name a file, or set ALIBABA_CLOUD_ACCESS_KEY_SECRET\n",
			"line 9: kms[0].alibaba.credentials: no security token\nhint: name a file, or set ALIBABA_CLOUD_SECURITY_TOKEN\n"}},
		"no token": {[]string{"local: {keyFile: key.yaml}", "alibaba: {region: cn-hangzhou, keyID: key-a, credentials: {type: oidc, roleARN: 'acs:ram::1:role/r', oidcProviderARN: 'acs:ram::1:oidc-provider/p'}}"}, 1, []string{
			"line 9: kms[0].alibaba.credentials: no OIDC token\nhint: name oidcTokenFile, or set ALIBABA_CLOUD_OIDC_TOKEN_FILE\n"}},
		"an entry with its own problem": {[]string{"key.yaml}", "open.yaml, x: y}"}, 1, []string{"line 9: kms[0].local.x: unknown field"}},
		"unreadable certificate":        {[]string{"127.0.0.1:0\netcd", "127.0.0.1:0\n  tls: {certFile: key.yaml, keyFile: key.yaml}\netcd"}, 1, []string{"listeners[0].tls.certFile", "not a certificate"}},
		"missing certificate":           {[]string{"127.0.0.1:0\netcd", "127.0.0.1:0\n  tls: {certFile: gone.crt, keyFile: key.yaml}\netcd"}, 1, []string{"gone.crt: no such file"}},
		"two rules with one prefix":     {[]string{"rules:\n", "rules:\n- {prefix: /registry/secrets/, writeWith: plaintext}\n"}, 1, []string{"rules[1].prefix", "the prefix of rules[0] too"}},
		"provider with a colon":         {[]string{"dev", "d:v"}, 1, []string{"kms[0].name", "has a colon"}},
		"undefined provider":            {[]string{"writeWith: dev", "writeWith: prod"}, 1, []string{"rules[0].writeWith: no KMS provider is called \"prod\"", "hint: define it under kms, or use plaintext or dev"}},
		"off loopback":                  {[]string{"address: 127.0.0.1:0\netcd", "address: 0.0.0.0:0\netcd"}, 1, []string{"line 4: listeners[0]: other machines reach", "insecurePlaintext: true"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			d := clitest.NewDir(t)
			key, err := os.ReadFile(d.Path("key.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(d.Path("open.yaml"), key, 0o644); err != nil {
				t.Fatal(err)
			}
			config := d.Config(t, tt.edits...)
			for code, r := range map[int]result{tt.check: execute(t, "config", "check", "--config", config), 3: execute(t, "serve", "--config", config)} {
				r.want(t, code, append(tt.texts, "error: ")...)
				for line := range strings.Lines(r.stderr) {
					if !strings.HasPrefix(line, "error: "+config+": line ") && !strings.HasPrefix(line, "hint: ") {
						t.Errorf("neither an error with its line nor a hint: %s", line)
					}
				}
			}
		})
	}
}

func TestKMSCheck(t *testing.T) {
	d := clitest.NewDir(t)
	config := d.Config(t)
	r := execute(t, "kms", "check", "--config", config)
	r.want(t, 0)
	if !strings.Contains(r.stdout, "dev (local): ok") || !strings.Contains(r.stdout, "key ID") || r.stderr != "" {
		t.Errorf("report: %+v", r)
	}
	down := d.Config(t, "kms:\n", "kms:\n- name: down\n  plugin: {endpoint: 'unix://"+d.Path("none.sock")+"', timeout: 100ms}\n")
	r = execute(t, "kms", "check", "--config", down, "--timeout", "2s", "--output", "json")
	r.want(t, 1)
	var report struct {
		OK  bool             `json:"ok"`
		KMS []providerReport `json:"kms"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
		t.Fatalf("%v: %s", err, r.stdout)
	}
	if report.OK || len(report.KMS) != 2 || report.KMS[0].OK || len(report.KMS[0].Findings) == 0 || !report.KMS[1].OK || report.KMS[1].KeyID == "" {
		t.Errorf("report = %+v", report)
	}
	execute(t, "kms", "check", "--config", d.Config(t, "kms:\n- name: dev\n  local: {keyFile: key.yaml}\nrules:\n- prefix: /registry/secrets/\n  writeWith: dev\n", "")).
		want(t, 3, "error: no KMS is configured")
}

// TestUnreadConfig: an error about permission names the file.
func TestUnreadConfig(t *testing.T) {
	if hint := command.Failure(command.Unreadable(fmt.Errorf("read configuration: %w", fs.ErrPermission))).Problem.Hint; !strings.Contains(hint, "may read the file") {
		t.Error(hint)
	}
	execute(t, "config", "check", "--config", clitest.NewDir(t).Path("none")).want(t, 3, "no such file", "hint: name the file with --config")
}

// TestNoTime: without time, no command says that etcd is unreachable, which it did not try.
func TestNoTime(t *testing.T) {
	d := clitest.NewDir(t)
	config := d.Config(t, "log:", "audit: {path: audit.jsonl}\nlog:")
	for _, line := range []string{"status", "reencrypt", "verify", "purge --yes", "decrypt --yes KEY"} {
		execute(t, append(strings.Fields(line), "--config", config, "--timeout", "0s")...).want(t, 2, "error: --timeout 0s is not more than 0s")
	}
}

// Package clients runs unmodified clients of etcd against a bare etcd and against the proxy with a
// rule for every key, and compares the results.
package clients

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const within = 30 * time.Second

// pair is two etcds of the same version, one of them behind the proxy.
type pair struct {
	*harness.Env
	bare, behind *harness.Etcd
	proxy        *harness.Proxy
	// ca signs all certificates, and client is a certificate without a common name. Without TLS
	// both are empty.
	ca     *harness.CA
	client harness.Pair
}

func newPair(t *testing.T, version string) *pair {
	t.Helper()
	return (&pair{Env: harness.New(t)}).start(version)
}

func newTLSPair(t *testing.T, version string) *pair {
	t.Helper()
	p := &pair{Env: harness.New(t)}
	p.ca = p.NewCA("all")
	p.client = p.ca.Client("client", "")
	return p.start(version)
}

func (p *pair) start(version string) *pair {
	p.TB.Helper()
	p.bare = p.StartEtcd(harness.EtcdConfig{Version: version, Name: "bare", Bare: true, CA: p.ca})
	p.behind = p.StartEtcd(harness.EtcdConfig{Version: version, Name: "behind", CA: p.ca})
	cfg := harness.ProxyConfig{
		Coordination: harness.NoCoordination(), Etcd: harness.Upstream{Endpoints: []string{p.behind.URL}},
		KMS: []harness.KMSConfig{p.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "", WriteWith: "dev", AllowPlaintextReads: new(false)}},
	}
	if p.ca != nil {
		cfg.Etcd.TLS = &harness.ClientTLS{CAFile: p.ca.File, CertFile: p.behind.Client.CertFile, KeyFile: p.behind.Client.KeyFile}
		server := p.ca.Server("proxy")
		cfg.Listeners = []harness.Listener{{
			Address: harness.FreeAddress(p.TB), TLS: &harness.ServerTLS{CertFile: server.CertFile, KeyFile: server.KeyFile, ClientCAFile: p.ca.File},
		}}
	}
	p.proxy = p.StartProxy("proxy", cfg)
	p.proxy.WaitReady(within)
	return p
}

// told is the output of a command, without the parts that differ between two servers or two runs.
type told struct {
	out, err string
	failed   bool
}

var differs = regexp.MustCompile(`127\.0\.0\.1:\d+|took (= )?[0-9.]+[µm]?s|(bare|behind)-[0-9a-f]+|\d+%|"ts":"[^"]*"|"caller":"[^"]*"|\d+(\.\d+)? (kB|MB|GB)|[0-9]{4}-[0-9T:.-]+Z?|0x[0-9a-f]+|Hash":\d+|hash":\d+|, \d{6,10}\b|[Dd]bSize[A-Za-z]*":\d+|elapsed[^,]*`)

var progress = regexp.MustCompile(`(?m)^\{"level":"info".*\n`)

func clean(s, dir string) string {
	s = progress.ReplaceAllString(s, "")
	return differs.ReplaceAllString(strings.ReplaceAll(s, dir, "DIR"), "…")
}

func run(t *testing.T, version, endpoint, dir, stdin string, args ...string) told {
	t.Helper()
	// etcdctl's own limit is 5 s, which a busy machine may need for a password alone.
	ctx, cancel := context.WithTimeout(t.Context(), 2*within)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Bin(t, "etcdctl-"+version), append([]string{"--endpoints", endpoint, "--command-timeout", within.String()}, args...)...)
	cmd.Env, cmd.Dir, cmd.Stdin = []string{"HOME=" + dir}, dir, strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited || ctx.Err() != nil {
		t.Fatalf("etcdctl %q: %v, %v\n%s%s", args, err, ctx.Err(), out.Bytes(), errs.Bytes())
	}
	return told{clean(out.String(), dir), clean(errs.String(), dir), err != nil}
}

// TestEtcdctl runs all commands that connect to one server, in every available version. %s is a
// value that must not reach etcd.
func TestEtcdctl(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"3.5", "3.6", "3.7", "3.8"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			p := newPair(t, version)
			p.proxy.RecordTested("etcdctl " + version)
			dirs := []string{t.TempDir(), t.TempDir()}
			secret := p.Sealed.Value("etcdctl")
			both := func(command, stdin string) told {
				t.Helper()
				var args []string
				for _, a := range strings.Fields(command) {
					args = append(args, strings.ReplaceAll(a, "%s", secret))
				}
				stdin = strings.ReplaceAll(stdin, "%s", secret)
				want := run(t, version, p.bare.URL, dirs[0], stdin, args...)
				got := run(t, version, "http://"+p.proxy.Address, dirs[1], stdin, args...)
				if want != got {
					t.Errorf("etcdctl %s\nbare etcd: %+v\nthe proxy: %+v", command, want, got)
				}
				return got
			}
			for _, c := range []struct {
				command, stdin string
			}{
				{"put a %s", ""}, {"put b", "%s"}, {"put a %s-2 --prev-kv", ""}, {"put c x --ignore-value", ""}, {"put none --ignore-value", ""},
				{"get a", ""}, {"get a -w json", ""}, {"get a -w fields", ""}, {"get a -w simple --print-value-only", ""}, {"get --prefix --keys-only a", ""}, {"get --from-key a --limit 1", ""},
				{"get --prefix ", ""}, {"get a z --order DESCEND --sort-by VALUE", ""}, {"get a --rev 2", ""}, {"get a --rev 999", ""}, {"get --count-only --prefix a -w fields", ""}, {"get --hex a", ""},
				{"txn", "value(\"a\") = \"%s-2\"\nmod(\"b\") > \"1\"\n\nput d %s\nget a\n\nget b\n\n"},
				{"txn", "value(\"a\") > \"%s-3\"\n\nput e %s\n\nget d\ndel b\n\n"},
				{"txn -w json", "val(\"nothing\") != \"%s\"\n\nput e %s\n\nput f %s\n\n"},
				{"del d --prev-kv", ""}, {"del --prefix e", ""}, {"del nothing", ""},
				{"lease grant 100 -w json --help", ""}, {"lease timetolive 1", ""}, {"lease revoke 1", ""}, {"lease list", ""}, {"lease keep-alive 1 --once", ""},
				{"compaction 3", ""}, {"compaction 3", ""}, {"get a --rev 2", ""},
				{"alarm list", ""}, {"alarm disarm", ""}, {"defrag", ""}, {"endpoint health", ""}, {"endpoint status", ""}, {"endpoint hashkv --rev 3 --help", ""}, {"member list", ""},
				{"member add x --peer-urls=nonsense", ""}, {"member remove 1", ""}, {"member promote 1", ""}, {"move-leader 1", ""},
				{"lock l echo held --ttl 30", ""}, {"elect -l nobody --help", ""}, {"version", ""}, {"check datascale --help", ""}, {"downgrade cancel", ""},
				{"snapshot save snapshot.db", ""},
				{"user add root:pw", ""}, {"user add alice:pw", ""}, {"role add readers", ""}, {"role grant-permission readers read a", ""}, {"user grant-role alice readers", ""}, {"user list", ""}, {"user get alice", ""},
				{"role list", ""}, {"role get readers", ""}, {"role add root", ""}, {"user grant-role root root", ""}, {"auth status", ""}, {"auth enable", ""},
				{"get a", ""}, {"--user alice:pw get a", ""}, {"--user alice:pw put a %s", ""}, {"--user alice:pw get b", ""}, {"--user alice:wrong get a", ""}, {"--user root:pw get b", ""}, {"--user root:pw user list", ""},
				{"--user alice:pw txn", "value(\"a\") = \"%s-2\"\n\nget a\n\n\n"}, {"--user alice:pw txn", "value(\"b\") = \"%s\"\n\nget a\n\n\n"}, {"--user alice:pw txn", "value(\"a\") = \"%s-2\"\n\nget a\n\nput a %s\n\n"},
				{"--user root:pw auth disable", ""}, {"user delete alice", ""}, {"role delete readers", ""},
			} {
				both(c.command, c.stdin)
			}
			if a := both("get a", ""); a.failed || !strings.Contains(a.out, secret) {
				t.Errorf("get a: %+v", a)
			}
			// A snapshot through the proxy contains what etcd stores.
			data, err := os.ReadFile(filepath.Join(dirs[1], "snapshot.db"))
			if err != nil || len(data) == 0 || bytes.Contains(data, []byte(secret)) || !bytes.Contains(data, []byte("k8s:enc:kms:v2:dev:")) {
				t.Errorf("the snapshot, of %d bytes, is not ciphertext: %v", len(data), err)
			}
			if out, code := p.Run("verify", "--config", p.proxy.ConfigFile, "--snapshot", filepath.Join(dirs[1], "snapshot.db")); code != 0 {
				t.Errorf("verify: %s", out)
			}
			// A mirror receives plaintext values.
			mirror := p.StartEtcd(harness.EtcdConfig{Version: version, Name: "mirror", Bare: true})
			p.mirrored(t, version, mirror, secret)
		})
	}
}

// mirrored runs make-mirror through the proxy until it has copied a value.
func (p *pair) mirrored(t *testing.T, version string, to *harness.Etcd, secret string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, harness.Bin(t, "etcdctl-"+version), "--endpoints", "http://"+p.proxy.Address, "make-mirror", to.Address)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, within, "the mirror", func() error {
		if got := run(t, version, to.URL, t.TempDir(), "", "get", "a", "--print-value-only"); !strings.Contains(got.out, secret) {
			return errors.New("not there yet")
		}
		return nil
	})
	cancel()
	_ = cmd.Wait() // the test killed it
}

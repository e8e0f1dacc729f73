package kubeadm

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

func read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func parse(t *testing.T, data []byte) *Manifest {
	t.Helper()
	m, err := ParseManifest(data)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// shapes are manifests of one content in several forms: what kubeadm wrote, and what is left of it
// after people and tools have edited it.
func shapes(t *testing.T) map[string][]byte {
	t.Helper()
	plain := read(t, "kube-apiserver-1.37.yaml")
	const flag = "--etcd-servers=https://127.0.0.1:2379"
	replace := func(old, text string) []byte {
		if !bytes.Contains(plain, []byte(old)) {
			t.Fatalf("%q is not in the manifest", old)
		}
		return bytes.Replace(plain, []byte(old), []byte(text), 1)
	}
	return map[string][]byte{
		"1.37":              plain,
		"1.30":              read(t, "kube-apiserver-1.30.yaml"),
		"external etcd":     read(t, "kube-apiserver-1.37-external-etcd.yaml"),
		"CRLF":              bytes.ReplaceAll(plain, []byte("\n"), []byte("\r\n")),
		"double quotes":     replace(flag, `"`+flag+`"`),
		"single quotes":     replace(flag, "'"+flag+"'"),
		"comment":           replace(flag, flag+" # etcd on this node"),
		"comment line":      replace("    - "+flag, "    # --etcd-servers=https://192.0.2.9:2379\n    - "+flag),
		"indented sequence": bytes.ReplaceAll(replace("    - kube-apiserver\n", "        - kube-apiserver\n"), []byte("\n    - --"), []byte("\n        - --")),
		"leading marker":    append([]byte("---\n"), plain...),
		"no newline at end": bytes.TrimSuffix(plain, []byte("\n")),
		"last argument":     bytes.Replace(replace("    - "+flag+"\n", ""), []byte("    image:"), []byte("    - "+flag+"\n    image:"), 1),
	}
}

func TestEditsOneLine(t *testing.T) {
	proxy := []string{"https://127.0.0.1:12379"}
	for name, data := range shapes(t) {
		t.Run(name, func(t *testing.T) {
			m := parse(t, data)
			before := m.EtcdServers()
			through, err := m.WithEtcdServers(proxy)
			if err != nil {
				t.Fatal(err)
			}
			if got := through.EtcdServers(); !slices.Equal(got, proxy) {
				t.Errorf("--etcd-servers is %q", got)
			}
			differ(t, data, through.Bytes(), 1, 1)
			back, err := parse(t, through.Bytes()).WithEtcdServers(before)
			if err != nil || !bytes.Equal(back.Bytes(), data) {
				t.Errorf("the way back does not lead to the same bytes: %v", err)
			}

			secrets, err := m.WithSecretsServers(proxy)
			if err != nil {
				t.Fatal(err)
			}
			if got := secrets.SecretsServers(); !slices.Equal(got, proxy) || !slices.Equal(secrets.EtcdServers(), before) {
				t.Errorf("Secrets go to %q, all else to %q", got, secrets.EtcdServers())
			}
			removed := 0
			if m.Flag(flagOverrides) != "" {
				removed = 1
			}
			differ(t, data, secrets.Bytes(), removed, 1)
			back, err = parse(t, secrets.Bytes()).WithSecretsServers(nil)
			if err != nil || !bytes.Equal(back.Bytes(), data) {
				t.Errorf("the way back does not lead to the same bytes: %v", err)
			}
		})
	}
}

// differ checks how many lines were removed and added, at one place.
func differ(t *testing.T, old, text []byte, removed, added int) {
	t.Helper()
	a, b := bytes.SplitAfter(old, []byte("\n")), bytes.SplitAfter(text, []byte("\n"))
	for len(a) > 0 && len(b) > 0 && bytes.Equal(a[0], b[0]) {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && bytes.Equal(a[len(a)-1], b[len(b)-1]) {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	if len(a) != removed || len(b) != added {
		t.Errorf("%d lines became %d, want %d and %d: %q, %q", len(a), len(b), removed, added, a, b)
	}
}

func TestOverridesOfOthersStay(t *testing.T) {
	m := parse(t, read(t, "kube-apiserver-1.37-external-etcd.yaml"))
	const events = "/events#https://192.0.2.31:2379;https://192.0.2.32:2379"
	n, err := m.WithSecretsServers([]string{"https://127.0.0.1:12379"})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := n.Flag(flagOverrides), events+",/secrets#https://127.0.0.1:12379"; got != want {
		t.Errorf("the overrides are %s, want %s", got, want)
	}
	if got := n.Flag("etcd-prefix"); got != "/cluster-7" {
		t.Errorf("--etcd-prefix is %q", got)
	}
}

func TestRefusesUnknownManifests(t *testing.T) {
	plain := string(read(t, "kube-apiserver-1.37.yaml"))
	const line = "    - --etcd-servers=https://127.0.0.1:2379\n"
	for name, c := range map[string]struct{ old, text, want string }{
		"not YAML":              {"apiVersion: v1", "\tapiVersion: [", "is not YAML"},
		"two documents":         {"status: {}", "status: {}\n---\na: 1", "more than one document"},
		"a Deployment":          {"kind: Pod", "kind: Deployment", "is not a v1 Pod"},
		"another version":       {"apiVersion: v1\n", "apiVersion: v2\n", "is not a v1 Pod"},
		"no containers":         {"  containers:", "  initContainers:", "no spec.containers"},
		"another program":       {"- kube-apiserver\n", "- kube-scheduler\n", "no container whose command"},
		"a shell":               {"- kube-apiserver\n", "- sh\n    - -c\n    - kube-apiserver\n", "no container whose command"},
		"another path":          {"- kube-apiserver\n", "- /opt/kube-apiserver\n", "no container whose command"},
		"args":                  {"    image:", "    args: [--v=2]\n    image:", "has args"},
		"two API servers":       {"  hostNetwork: true", "  - command: [kube-apiserver]\n    name: b\n  hostNetwork: true", "two containers"},
		"no etcd-servers":       {line, "", "has no --etcd-servers"},
		"etcd-servers twice":    {line, line + line, "--etcd-servers 2 times"},
		"overrides twice":       {line, line + "    - --etcd-servers-overrides=/events#http://a:1\n    - --etcd-servers-overrides=/events#http://b:1\n", "overrides 2 times"},
		"value apart":           {line, "    - --etcd-servers\n    - https://127.0.0.1:2379\n", "equals sign"},
		"underscores":           {"--etcd-servers=", "--etcd_servers=", "underscores"},
		"both spellings":        {line, line + "    - --etcd_servers=https://192.0.2.9:2379\n", "underscores"},
		"escapes":               {"--etcd-servers=https://127.0.0.1:2379", `"--etcd-servers=https://127.0.0.1\x3a2379"`, "escaped"},
		"block scalar":          {"- --etcd-servers=https://127.0.0.1:2379", "- >-\n      --etcd-servers=https://127.0.0.1:2379", "escaped"},
		"an anchor":             {"- --etcd-servers", "- &e --etcd-servers", "anchor"},
		"an alias":              {"- --allow-privileged=true", "- &e --allow-privileged=true\n    - *e", "anchor"},
		"spec twice":            {"status: {}", "spec: {}", `field "spec" twice`},
		"command twice":         {"    image:", "    command: [kube-apiserver]\n    image:", `field "command" twice`},
		"a mapping as argument": {line, line + "    - a: b\n", "something else than text"},
		"empty":                 {plain, "", "is not YAML"},
		"a list":                {plain, "- a\n", "is not a v1 Pod"},
		"null":                  {plain, "null\n", "is not a v1 Pod"},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.Contains(plain, c.old) {
				t.Fatalf("%q is not in the manifest", c.old)
			}
			_, err := ParseManifest([]byte(strings.Replace(plain, c.old, c.text, 1)))
			r, ok := errors.AsType[problem.Problem](err)
			if !ok || !strings.Contains(r.Text, c.want) || r.Hint == "" {
				t.Errorf("%v, want a refusal with %q", err, c.want)
			}
		})
	}
	// The command in one line.
	i, j := strings.Index(plain, "  - command:"), strings.Index(plain, "    image:")
	flow := plain[:i] + "  - command: [kube-apiserver, --etcd-servers=https://127.0.0.1:2379]\n" + plain[j:]
	if _, err := ParseManifest([]byte(flow)); err == nil || !strings.Contains(err.Error(), "one line") {
		t.Errorf("a command in one line: %v", err)
	}
}

func FuzzManifest(f *testing.F) {
	for _, name := range []string{"kube-apiserver-1.37.yaml", "kube-apiserver-1.30.yaml", "kube-apiserver-1.37-external-etcd.yaml"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ParseManifest(data)
		if err != nil {
			return
		}
		before := m.EtcdServers()
		n, err := m.WithEtcdServers([]string{"https://127.0.0.1:12379"})
		if err != nil {
			return
		}
		back, err := n.WithEtcdServers(before)
		if err != nil || !bytes.Equal(back.Bytes(), data) {
			t.Errorf("the way back does not lead to the same bytes: %v", err)
		}
	})
}

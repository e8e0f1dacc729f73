package kubernetes

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

// key32 is a secret of 32 bytes that no error and no output may hold, as a file has it.
var key32 = base64.StdEncoding.EncodeToString([]byte("canary-canary-canary-canary-3232"))

const head = "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n"

// entry is an element of resources.
func entry(resources, providers string) string {
	return "- resources: [" + resources + "]\n  providers: [" + strings.ReplaceAll(providers, "KEY", key32) + "]\n"
}

const (
	identity = "{identity: {}}"
	acme     = "{kms: {apiVersion: v2, name: acme, endpoint: unix:///run/kms.sock}}"
	other    = "{kms: {apiVersion: v2, name: other, endpoint: unix:///run/other.sock, timeout: 1500ms}}"
	third    = "{kms: {apiVersion: v2, name: third, endpoint: unix:///run/third.sock}}"
	aescbc   = "{aescbc: {keys: [{name: key1, secret: KEY}]}}"
	aesgcm   = "{aesgcm: {keys: [{name: key1, secret: KEY}]}}"
	box      = "{secretbox: {keys: [{name: key1, secret: KEY}]}}"
)

// convert converts and loads the result as the proxy does.
func convert(t *testing.T, text string, o Options) (*Result, *config.Config) {
	t.Helper()
	c, err := Read([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o.Source, o.KeyFile = "encryption.yaml", func(p string) string { return filepath.Join(dir, p+".yaml") }
	result, err := c.Convert(o)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range result.KeyFiles {
		if err := os.WriteFile(f.Path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, result.Text, 0o600); err != nil {
		t.Fatal(err)
	}
	loaded, err := config.Load(path)
	if result.Unfinished != "" {
		if ps, _ := errors.AsType[config.Problems](err); len(ps) != 1 || ps[0].Path != "kms[0].plugin.endpoint" {
			t.Errorf("with the placeholder: %v", err)
		}
		loaded, err = config.Load(filledIn(t, path, result.Text))
	}
	if err != nil {
		t.Fatalf("%v in\n%s", err, result.Text)
	}
	if strings.Contains(string(result.Text), key32) || strings.Contains(fmt.Sprintf("%v %+v %#v %s %x", c, c, result.KeyFiles, result.KeyFiles, result.KeyFiles), "canary") {
		t.Errorf("a secret is shown:\n%s\n%+v", result.Text, c)
	}
	for _, n := range result.Notes {
		if !strings.Contains(string(result.Text), "# NOTE: "+n+".\n") {
			t.Errorf("no comment says %q", n)
		}
	}
	return result, loaded
}

// filledIn writes a configuration to path, with an endpoint in place of the placeholder.
func filledIn(t *testing.T, path string, text []byte) string {
	t.Helper()
	if err := os.WriteFile(path, bytes.ReplaceAll(text, []byte(config.Placeholder), []byte("kms")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// brief prints a rule in a line.
func brief(r config.Rule) string {
	s := r.Prefix + " " + r.WriteWith
	if len(r.ReadWith) > 0 {
		s += " reads " + strings.Join(r.ReadWith, ",")
	}
	if r.AllowPlaintextReads {
		s += " plaintext"
	}
	return s
}

func TestRules(t *testing.T) {
	core := func(how string, except ...string) (rules []string) {
		for _, p := range []string{"configmaps", "services/endpoints", "events", "limitranges", "namespaces", "minions", "persistentvolumeclaims", "persistentvolumes", "pods", "podtemplates",
			"controllers", "resourcequotas", "secrets", "serviceaccounts", "services/specs"} {
			if !strings.Contains(" "+strings.Join(except, " ")+" ", " "+p+" ") {
				rules = append(rules, "/registry/"+p+"/ "+how)
			}
		}
		return rules
	}
	exempt := []string{"/registry/masterleases/ plaintext plaintext", "/registry/peerserverleases/ plaintext plaintext", "/registry/ranges/ plaintext plaintext"}
	for name, c := range map[string]struct {
		entries    string
		options    Options
		want       []string
		notes      int
		unfinished string
	}{
		"the first writes, all are read": {entries: entry("secrets", acme+","+other+","+aescbc+","+box+","+identity),
			want: []string{"/registry/secrets/ acme reads other,kubernetes-aescbc,kubernetes-secretbox plaintext"}},
		"without identity, strict":       {entries: entry("secrets", acme), want: []string{"/registry/secrets/ acme"}},
		"identity first":                 {entries: entry("secrets", identity+","+aescbc+","+acme), want: []string{"/registry/secrets/ plaintext reads kubernetes-aescbc,acme plaintext"}},
		"aescbc first":                   {entries: entry("secrets", aescbc+","+identity), want: []string{"/registry/secrets/ main reads kubernetes-aescbc plaintext"}, notes: 1, unfinished: "main"},
		"aesgcm first, named":            {entries: entry("secrets", aesgcm), options: Options{WriteWith: "ack"}, want: []string{"/registry/secrets/ ack reads kubernetes-aesgcm"}, notes: 1, unfinished: "ack"},
		"secretbox first, kms behind it": {entries: entry("secrets", box+","+acme), want: []string{"/registry/secrets/ acme reads kubernetes-secretbox"}, notes: 1},
		"kms behind it, another named": {entries: entry("secrets", box+","+acme) + entry("configmaps", other), options: Options{WriteWith: "other"},
			want: []string{"/registry/secrets/ other reads kubernetes-secretbox,acme", "/registry/configmaps/ other"}, notes: 1},
		"main is taken": {entries: entry("secrets", aescbc) + entry("configmaps", "{kms: {apiVersion: v2, name: main, endpoint: unix:///run/kms.sock}}"),
			want: []string{"/registry/secrets/ main-2 reads kubernetes-aescbc", "/registry/configmaps/ main"}, notes: 1, unfinished: "main-2"},
		"the reader's name is taken": {entries: entry("secrets", "{kms: {apiVersion: v2, name: kubernetes-aescbc, endpoint: unix:///run/kms.sock}},"+aescbc),
			want: []string{"/registry/secrets/ kubernetes-aescbc reads kubernetes-aescbc-2"}},
		"one resource in two entries": {entries: entry("secrets", acme) + entry("configmaps", identity) + entry("secrets", aescbc+","+identity),
			want: []string{"/registry/secrets/ acme reads kubernetes-aescbc plaintext", "/registry/configmaps/ plaintext plaintext"}},
		"exceptions": {entries: entry("replicationcontrollers, services, endpoints, nodes, ingresses.networking.k8s.io, pods, networkpolicies.networking.k8s.io, events", acme),
			want: []string{"/registry/controllers/ acme", "/registry/services/specs/ acme", "/registry/services/endpoints/ acme", "/registry/minions/ acme", "/registry/ingress/ acme", "/registry/pods/ acme",
				"/registry/networkpolicies/ acme", "/registry/events/ acme"}},
		"groups": {entries: entry("deployments.apps, customresourcedefinitions.apiextensions.k8s.io, apiservices.apiregistration.k8s.io, widgets.stable.example.com, volumesnapshots.snapshot.storage.k8s.io", acme),
			want: []string{"/registry/deployments/ acme", "/registry/apiextensions.k8s.io/customresourcedefinitions/ acme", "/registry/apiregistration.k8s.io/apiservices/ acme",
				"/registry/stable.example.com/widgets/ acme", "/registry/snapshot.storage.k8s.io/volumesnapshots/ acme"}},
		"unknown": {entries: entry("secret, foos.apps", acme), want: []string{"/registry/secret/ acme", "/registry/foos/ acme"}, notes: 2},
		"wildcards of groups": {entries: entry("'*.batch', '*.stable.example.com', '*.apiextensions.k8s.io'", acme),
			want: []string{"/registry/cronjobs/ acme", "/registry/jobs/ acme", "/registry/stable.example.com/ acme", "/registry/apiextensions.k8s.io/ acme"}, notes: 1},
		"the core group": {entries: entry("'*.'", acme), want: core("acme"), notes: 1},
		"resources go before wildcards": {entries: entry("events", identity) + entry("secrets, widgets.stable.example.com", other) + entry("'*.'", acme) + entry("'*.stable.example.com'", identity) + entry("'*.*'", third+","+identity),
			want: append(append([]string{"/registry/events/ plaintext plaintext", "/registry/secrets/ other", "/registry/stable.example.com/widgets/ other"}, core("acme", "events", "secrets")...),
				append([]string{"/registry/stable.example.com/ plaintext plaintext", "/registry/ third plaintext"}, exempt...)...), notes: 2},
		"everything":              {entries: entry("'*.*'", acme), want: append([]string{"/registry/ acme"}, exempt...), notes: 1},
		"everything is plaintext": {entries: entry("'*.*'", identity), want: []string{"/registry/ plaintext plaintext"}},
		"another prefix":          {entries: entry("secrets", acme), options: Options{EtcdPrefix: "k8s//dev/"}, want: []string{"/k8s/dev/secrets/ acme"}},
		"the root":                {entries: entry("secrets", acme), options: Options{EtcdPrefix: "/"}, want: []string{"/secrets/ acme"}},
		"a prefix to quote":       {entries: entry("secrets", acme), options: Options{EtcdPrefix: "/a: b#"}, want: []string{"/a: b#/secrets/ acme"}},
	} {
		t.Run(name, func(t *testing.T) {
			result, loaded := convert(t, head+c.entries, c.options)
			var got []string
			for _, r := range loaded.Rules {
				got = append(got, brief(r))
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("rules (-want +got):\n%s", diff)
			}
			if len(result.Notes) != c.notes || result.Unfinished != c.unfinished {
				t.Errorf("unfinished %q, notes %q", result.Unfinished, result.Notes)
			}
		})
	}
}

func TestProviders(t *testing.T) {
	second := base64.StdEncoding.EncodeToString([]byte("another-another-"))
	two := strings.ReplaceAll("{aescbc: {keys: [{name: key2, secret: SECOND}, {name: key1, secret: KEY}]}}", "SECOND", second)
	again := strings.ReplaceAll("{aescbc: {keys: [{name: key1, secret: KEY}, {name: key1, secret: SECOND}, {name: key1, secret: KEY}, {name: 'a:b', secret: KEY}]}}", "SECOND", second)
	result, loaded := convert(t, head+entry("secrets", acme+","+aescbc+","+two)+entry("configmaps", other+","+aescbc+","+again+","+box), Options{})
	var got []string
	for _, f := range result.KeyFiles {
		line := f.Provider + " " + f.Kind
		for _, k := range f.Keys {
			line += fmt.Sprintf(" %s/%d", k.Name, len(k.Secret))
		}
		got = append(got, line)
	}
	want := []string{"kubernetes-aescbc aescbc key1/32", "kubernetes-aescbc-2 aescbc key2/16 key1/32", "kubernetes-aescbc-3 aescbc key1/32 a:b/32", "kubernetes-aescbc-4 aescbc key1/16",
		"kubernetes-secretbox secretbox key1/32"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("key files (-want +got):\n%s", diff)
	}
	if r := brief(loaded.Rules[1]); r != "/registry/configmaps/ other reads kubernetes-aescbc,kubernetes-aescbc-3,kubernetes-aescbc-4,kubernetes-secretbox" {
		t.Error(r)
	}
	for i, k := range loaded.KMS[:2] {
		if want := []string{"acme unix:///run/kms.sock 3s", "other unix:///run/other.sock 1.5s"}[i]; fmt.Sprint(k.Name, " ", k.Plugin.Endpoint, " ", k.Plugin.Timeout) != want {
			t.Errorf("%s: %+v", k.Name, k.Plugin)
		}
	}
	for i, f := range result.KeyFiles {
		if k := loaded.KMS[i+2]; k.Name != f.Provider || k.Kubernetes == nil || k.Kubernetes.Type != f.Kind || k.Kubernetes.KeyFile != f.Path {
			t.Errorf("%+v is not %s", k, f.Provider)
		}
	}
	if _, err := (&Configuration{}).Convert(Options{WriteWith: "a:b"}); err == nil {
		t.Error("a bad name was taken")
	}
}

// TestJSON: kube-apiserver reads JSON too.
func TestJSON(t *testing.T) {
	_, loaded := convert(t, `{"apiVersion":"apiserver.config.k8s.io/v1","kind":"EncryptionConfiguration","resources":[{"resources":["secrets"],"providers":[
	{"kms":{"apiVersion":"v2","name":"acme","endpoint":"unix:///run//kms.sock","timeout":"5s"}},{"identity":{}}]}]}`, Options{})
	if len(loaded.Rules) != 1 || brief(loaded.Rules[0]) != "/registry/secrets/ acme plaintext" || loaded.KMS[0].Plugin.Endpoint != "unix:///run/kms.sock" {
		t.Errorf("%+v", loaded)
	}
}

// TestCases are files that others had.
func TestCases(t *testing.T) {
	for name, want := range map[string]string{
		"abstract-socket.yaml":   "/registry/secrets/ acme plaintext",
		"trailing-document.yaml": "/registry/secrets/ plaintext plaintext",
		"colon-key-names.yaml":   "/registry/secrets/ main reads kubernetes-aescbc plaintext",
	} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		result, loaded := convert(t, string(data), Options{})
		if len(loaded.Rules) != 1 || brief(loaded.Rules[0]) != want {
			t.Errorf("%s: %+v, want %s", name, loaded.Rules, want)
		}
		if name == "abstract-socket.yaml" && loaded.KMS[0].Plugin.Endpoint != "unix:///@acme-kms" {
			t.Errorf("%s: %+v", name, loaded.KMS[0].Plugin)
		}
		if name == "colon-key-names.yaml" && (len(result.KeyFiles) != 1 || result.KeyFiles[0].Keys[0].Name != "aescbckey-2025-12-27T23:41:02+08:00") {
			t.Errorf("%s: %+v", name, result.KeyFiles)
		}
	}
}

func TestProblems(t *testing.T) {
	one := func(provider string) string { return head + entry("secrets", provider) }
	for name, c := range map[string]struct {
		text string
		line int
		want string
	}{
		"empty":             {"", 1, "the file is empty"},
		"not YAML":          {head + "\t- x", 4, "not YAML"},
		"a list":            {"[]", 1, "is not a mapping"},
		"another kind":      {"apiVersion: v1\nkind: Secret\n", 1, "not an EncryptionConfiguration"},
		"the old form":      {"apiVersion: v1\nkind: EncryptionConfig\nresources: []\n", 1, "Kubernetes 1.12"},
		"two documents":     {one(identity) + "---\nkind: x\n", 6, "a second YAML document begins here"},
		"a third document":  {one(identity) + "---\n# nothing\n---\nkind: x\n", 8, "a second YAML document begins here"},
		"not YAML, second":  {one(identity) + "---\n\t- x\n", 7, "not YAML"},
		"no resources":      {strings.Replace(head, "resources:", "resources: []", 1), 3, "resources: is empty"},
		"resources absent":  {strings.Replace(head, "resources:\n", "", 1), 1, "resources: is required"},
		"no providers":      {head + "- resources: [secrets]\n", 4, "resources[0].providers: is required"},
		"no list":           {head + "- resources: secrets\n  providers: [" + identity + "]\n", 4, "is not a list"},
		"unknown field":     {head + "- resources: [secrets]\n  provider: []\n  providers: [" + identity + "]\n", 5, "resources[0]: has an unknown field"},
		"a field twice":     {head + "- resources: [secrets]\n  resources: [pods]\n  providers: [" + identity + "]\n", 5, "is given twice"},
		"an anchor":         {head + "- &a\n  resources: [secrets]\n  providers: [" + identity + "]\n", 4, "anchors"},
		"two providers":     {one("{identity: {}, " + aescbc[1:]), 5, "resources[0].providers[0]: has 2 providers"},
		"no provider":       {one("{}"), 5, "has 0 providers"},
		"unknown provider":  {one("{des: {}}"), 5, "unknown field"},
		"identity is null":  {one("{identity: }"), 5, "is not a mapping"},
		"identity says":     {one("{identity: {a: b}}"), 5, "unknown field"},
		"no keys":           {one("{aescbc: {keys: []}}"), 5, "keys: is empty"},
		"no name":           {one("{aescbc: {keys: [{secret: KEY}]}}"), 5, "keys[0].name: is required"},
		"no secret":         {one("{aescbc: {keys: [{name: a}]}}"), 5, "has 0 bytes"},
		"not base64":        {one("{aescbc: {keys: [{name: a, secret: KEY!}]}}"), 5, "is not base64"},
		"a short secret":    {one("{secretbox: {keys: [{name: a, secret: YWJjZGVmZ2hpamtsbW5vcA==}]}}"), 5, "has 16 bytes"},
		"a secret as name":  {one("{aescbc: {keys: [{name: a, KEY: secret}]}}"), 5, "unknown field"},
		"number":            {one("{aescbc: {keys: [{name: 1, secret: KEY}]}}"), 5, "put it in quotes"},
		"kms v1":            {one("{kms: {apiVersion: v1, name: a, endpoint: unix:///a}}"), 5, "KMS v1"},
		"kms, no version":   {one("{kms: {name: a, endpoint: unix:///a, cachesize: 10}}"), 5, "KMS v1"},
		"kms v3":            {one("{kms: {apiVersion: v3, name: a, endpoint: unix:///a}}"), 5, "neither v1 nor v2"},
		"cachesize":         {one("{kms: {apiVersion: v2, name: a, endpoint: unix:///a, cachesize: '1'}}"), 5, "is not of v2"},
		"kms name":          {one("{kms: {apiVersion: v2, name: a/b, endpoint: unix:///a}}"), 5, "cannot be renamed here"},
		"kms named so":      {one("{kms: {apiVersion: v2, name: plaintext, endpoint: unix:///a}}"), 5, "not encrypting"},
		"kms, colon":        {one("{kms: {apiVersion: v2, name: 'a:b', endpoint: unix:///a}}"), 5, "colon"},
		"kms, no name":      {one("{kms: {apiVersion: v2, endpoint: unix:///a}}"), 5, "is not a provider's name"},
		"tcp":               {one("{kms: {apiVersion: v2, name: a, endpoint: 'tcp://127.0.0.1:1'}}"), 5, "is not a unix socket"},
		"abstract, no name": {one("{kms: {apiVersion: v2, name: a, endpoint: 'unix:///@'}}"), 5, "is not a unix socket"},
		"abstract, odd":     {one("{kms: {apiVersion: v2, name: a, endpoint: 'unix:///@a/../b'}}"), 5, "is not a unix socket"},
		"a long socket":     {one("{kms: {apiVersion: v2, name: a, endpoint: 'unix:///" + strings.Repeat("a", 107) + "'}}"), 5, "is not a unix socket"},
		"timeout":           {one("{kms: {apiVersion: v2, name: a, endpoint: unix:///a, timeout: 3}}"), 5, "timeout"},
		"timeout of 0":      {one("{kms: {apiVersion: v2, name: a, endpoint: unix:///a, timeout: 0s}}"), 5, "is not a duration"},
		"kms twice":         {head + entry("secrets", acme) + entry("pods", acme), 7, `called "acme" is on line 5 too`},
		"star":              {head + entry("'*'", identity), 4, "ambiguous"},
		"all groups":        {head + entry("'secrets.*'", identity), 4, "of all groups"},
		"capital":           {head + entry("Secrets", identity), 4, "is not a resource"},
		"slash":             {head + entry("pods/status", identity), 4, "is not a resource"},
		"dots":              {head + entry("pods.a..b", identity), 4, "is not a resource"},
		"events":            {head + entry("events.events.k8s.io", identity), 4, "core group"},
		"extensions":        {head + entry("ingresses.extensions", identity), 4, "is gone"},
		"no resource":       {head + entry("serviceipallocations", identity), 4, "is never encrypted"},
		"resource twice":    {head + entry("pods, pods", identity), 4, "is in the list twice"},
		"overlap":           {head + entry("pods, '*.'", identity), 4, "covered by a wildcard"},
		"overlap of all":    {head + entry("'*.apps', '*.*'", identity), 4, "covered by a wildcard"},
		"masked by group":   {head + entry("'*.'", identity) + entry("secrets", identity), 6, `an earlier entry has "*."`},
		"masked by all":     {head + entry("'*.*'", identity) + entry("'*.apps'", identity), 6, `an earlier entry has "*.*"`},
		"masked itself":     {head + entry("'*.apps'", identity) + entry("'*.apps'", identity), 6, `an earlier entry has "*.apps"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Read([]byte(strings.ReplaceAll(c.text, "KEY", key32)))
			ps, ok := errors.AsType[config.Problems](err)
			if !ok || len(ps) != 1 || ps[0].Line != c.line || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), key32[:20]) {
				t.Errorf("%v\nwant line %d: %s", err, c.line, c.want)
			}
		})
	}
}

// FuzzRead: whatever is read converts to what the proxy loads, and nothing shows a secret.
func FuzzRead(f *testing.F) {
	for _, e := range []string{entry("secrets", acme+","+aescbc), entry("'*.*'", box+","+identity), entry("'*.'", other), entry("a.b.c, '*.apps'", aesgcm)} {
		f.Add([]byte(head + e))
	}
	dir := f.TempDir()
	key := filepath.Join(dir, "key.yaml")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Read(data)
		if err != nil {
			return
		}
		result, err := c.Convert(Options{KeyFile: func(string) string { return key }})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := config.Load(filledIn(t, filepath.Join(t.TempDir(), "config.yaml"), result.Text)); err != nil {
			t.Errorf("%v in\n%s", err, result.Text)
		}
	})
}

package cli

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

// The folders of setup compose: each is a volume, and who mounts it sees no other's keys.
const (
	composeCA         = "ca"         // the authorities' keys; mounted by the job alone
	composeEtcd       = "etcd"       // the three members
	composeProxy      = "proxy"      // the proxies: configuration, local key, certificates
	composeClient     = "client"     // clients of the proxies and of kube-apiserver
	composeKubernetes = "kubernetes" // kube-apiserver
)

// composeKMS is what the environment says of the KMS.
type composeKMS struct {
	Kind        string // local or alibaba
	Region      string
	KeyID       string
	Endpoint    string
	Credentials string
	// Local says that there is a local key, whose values stay readable.
	Local bool
}

// composeConfig is the proxies' configuration. Texts from the environment are checked to be plain
// words.
var composeConfig = template.Must(template.New("config.yaml").Parse(`# Written by "etcd-kms-proxy setup compose" at each start, from .env: changes here are lost.
apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
- address: 0.0.0.0:2379
  tls: {certFile: server.crt, keyFile: server.key, clientCAFile: client-ca.crt}
etcd:
  endpoints: [https://etcd-1:2379, https://etcd-2:2379, https://etcd-3:2379]
  tls: {caFile: etcd-ca.crt, certFile: etcd-client.crt, keyFile: etcd-client.key}
kms:
{{- if eq .Kind "alibaba"}}
- name: alibaba
  alibaba:
    region: "{{.Region}}"
    keyID: "{{.KeyID}}"
    {{- if .Endpoint}}
    endpoint: "{{.Endpoint}}"
    {{- end}}
    credentials: {type: {{.Credentials}}}
{{- end}}
{{- if .Local}}
- name: local
  local: {keyFile: key.yaml}
{{- end}}
rules:
- prefix: ""
  writeWith: {{.Kind}}
  {{- if and (eq .Kind "alibaba") .Local}}
  readWith: [local]
  {{- end}}
  allowPlaintextReads: false
admin: {address: "0.0.0.0:9379"}
audit: {path: /var/log/etcd-kms-proxy/audit.jsonl}
`))

// composeKubeconfig is how a user of this machine reaches kube-apiserver. The files stand beside
// it.
const composeKubeconfig = `apiVersion: v1
kind: Config
clusters:
- name: compose
  cluster: {server: "https://127.0.0.1:16443", certificate-authority: kube-ca.crt}
users:
- name: admin
  user: {client-certificate: kube-admin.crt, client-key: kube-admin.key}
contexts:
- name: compose
  context: {cluster: compose, user: admin}
current-context: compose
`

// setupCompose makes all files below dir, as of now. getenv gives the environment.
func setupCompose(dir string, getenv func(string) string, now time.Time) error {
	for _, name := range []string{composeCA, composeEtcd, composeProxy, composeClient, composeKubernetes} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	// The settings first: a mistake in them changes nothing.
	kms, err := composeSettings(dir, getenv)
	if err != nil {
		return err
	}
	if kms.Kind == "local" && !kms.Local {
		if err := refuseLostKey(dir); err != nil {
			return err
		}
		if err := local.NewKeyFile(filepath.Join(dir, composeProxy, "key.yaml")); err != nil {
			return err
		}
		kms.Local = true
	}
	if err := composeCertificates(dir, now); err != nil {
		return err
	}
	var text bytes.Buffer
	if err := composeConfig.Execute(&text, kms); err != nil {
		return err
	}
	// Last, so that a proxy with a configuration has all that it names.
	return writeAtomically(filepath.Join(dir, composeProxy, "config.yaml"), text.Bytes())
}

// refuseLostKey fails if a member of etcd has data: a new key would open none of it, and writes
// under that key would hide the loss.
func refuseLostKey(dir string) error {
	for _, member := range []string{"etcd-1", "etcd-2", "etcd-3"} {
		entries, err := os.ReadDir(filepath.Join(dir, member))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if len(entries) > 0 {
			return &failure{
				code: exitFailure, err: fmt.Errorf("%s has data, and the local key that it was encrypted with is gone: there is no %s", member, filepath.Join(dir, composeProxy, "key.yaml")),
				hint: "put the key file back from its backup; to start without the data, remove etcd's volumes too (`docker compose down --volumes`)",
			}
		}
	}
	return nil
}

// composeSettings reads and checks the environment against what an earlier run has left.
func composeSettings(dir string, getenv func(string) string) (*composeKMS, error) {
	folder := filepath.Join(dir, composeProxy)
	exists := func(name string) (bool, error) {
		_, err := os.Stat(filepath.Join(folder, name))
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	}
	kms := &composeKMS{
		Kind: getenv("KMS"), Region: getenv("ALIBABA_KMS_REGION"), KeyID: getenv("ALIBABA_KMS_KEY_ID"),
		Endpoint: getenv("ALIBABA_KMS_ENDPOINT"), Credentials: getenv("ALIBABA_KMS_CREDENTIALS"),
	}
	var err error
	if kms.Local, err = exists("key.yaml"); err != nil {
		return nil, err
	}
	switch kms.Kind {
	case "", "local":
		kms.Kind = "local"
		if kms.Region+kms.KeyID != "" {
			return nil, &failure{code: exitFailure, err: errors.New("KMS is local, and ALIBABA_KMS_REGION or ALIBABA_KMS_KEY_ID is set"), hint: "set KMS=alibaba in .env, or remove the others"}
		}
		before, err := os.ReadFile(filepath.Join(folder, "config.yaml")) //nolint:gosec // the operator names the folder
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if bytes.Contains(before, []byte("\n  writeWith: alibaba\n")) {
			return nil, &failure{
				code: exitFailure, err: errors.New("this stack writes with Alibaba Cloud KMS, and the environment does not name it: is .env missing?"),
				hint: "put .env back beside docker-compose.yml, as deploy/compose/alibaba.env.example shows, and start again",
			}
		}
		return kms, nil
	case "alibaba":
	default:
		return nil, &failure{code: exitFailure, err: fmt.Errorf("KMS is %q", kms.Kind), hint: "write KMS=local or KMS=alibaba in .env"}
	}
	if kms.Credentials == "" {
		kms.Credentials = "accessKey"
	}
	required := []string{"ALIBABA_KMS_REGION", "ALIBABA_KMS_KEY_ID"}
	switch kms.Credentials {
	case "accessKey":
		required = append(required, "ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET")
	case "sts":
		required = append(required, "ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "ALIBABA_CLOUD_SECURITY_TOKEN")
	case "ecsRAMRole":
	default:
		return nil, &failure{code: exitFailure, err: fmt.Errorf("ALIBABA_KMS_CREDENTIALS is %q", kms.Credentials), hint: "write accessKey, sts or ecsRAMRole"}
	}
	var missing []string
	for _, name := range required {
		if getenv(name) == "" {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return nil, &failure{
			code: exitFailure, err: fmt.Errorf("KMS is alibaba, and nothing is set for %s", strings.Join(missing, ", ")),
			hint: "copy deploy/compose/alibaba.env.example to .env beside docker-compose.yml and fill it in",
		}
	}
	for name, text := range map[string]string{"ALIBABA_KMS_REGION": kms.Region, "ALIBABA_KMS_KEY_ID": kms.KeyID, "ALIBABA_KMS_ENDPOINT": kms.Endpoint} {
		if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
			return nil, &failure{code: exitFailure, err: fmt.Errorf("%s holds white space, quotes or control characters", name), hint: "write it in .env as Alibaba Cloud shows it, without quotes"}
		}
	}
	return kms, nil
}

// composeCertificates makes the three authorities and all certificates.
func composeCertificates(dir string, now time.Time) error {
	at := func(folder, name string) string { return filepath.Join(dir, folder, name) }
	open := func(name string) (*authority, error) {
		return openAuthority(at(composeCA, name+".crt"), at(composeCA, name+".key"), "etcd-kms-proxy compose "+name, now)
	}
	etcd, err := open("etcd")
	if err != nil {
		return err
	}
	proxy, err := open("proxy")
	if err != nil {
		return err
	}
	kube, err := open("kubernetes")
	if err != nil {
		return err
	}
	serves, calls := x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth
	for _, c := range []struct {
		by     *authority
		folder string
		name   string
		leaf   leaf
	}{
		{etcd, composeEtcd, "etcd-1", leaf{subject: pkix.Name{CommonName: "etcd-1"}, names: []string{"etcd-1", "localhost", "127.0.0.1"}, usages: []x509.ExtKeyUsage{serves, calls}}},
		{etcd, composeEtcd, "etcd-2", leaf{subject: pkix.Name{CommonName: "etcd-2"}, names: []string{"etcd-2", "localhost", "127.0.0.1"}, usages: []x509.ExtKeyUsage{serves, calls}}},
		{etcd, composeEtcd, "etcd-3", leaf{subject: pkix.Name{CommonName: "etcd-3"}, names: []string{"etcd-3", "localhost", "127.0.0.1"}, usages: []x509.ExtKeyUsage{serves, calls}}},
		// Without a common name: etcd would take it for a user once its authentication is on.
		{etcd, composeProxy, "etcd-client", leaf{subject: pkix.Name{Organization: []string{"etcd-kms-proxy"}}, usages: []x509.ExtKeyUsage{calls}}},
		{proxy, composeProxy, "server", leaf{subject: pkix.Name{CommonName: "etcd-kms-proxy"}, names: []string{"proxy-1", "proxy-2", "localhost", "127.0.0.1"}, usages: []x509.ExtKeyUsage{serves}}},
		{proxy, composeClient, "client", leaf{subject: pkix.Name{CommonName: "client"}, usages: []x509.ExtKeyUsage{calls}}},
		{proxy, composeKubernetes, "etcd-client", leaf{subject: pkix.Name{CommonName: "kube-apiserver"}, usages: []x509.ExtKeyUsage{calls}}},
		{kube, composeKubernetes, "server", leaf{
			subject: pkix.Name{CommonName: "kube-apiserver"}, usages: []x509.ExtKeyUsage{serves},
			names: []string{"kube-apiserver", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "127.0.0.1", "10.96.0.1"},
		}},
		{kube, composeClient, "kube-admin", leaf{subject: pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}, usages: []x509.ExtKeyUsage{calls}}},
	} {
		if err := c.by.issue(at(c.folder, c.name+".crt"), at(c.folder, c.name+".key"), c.leaf, now); err != nil {
			return err
		}
	}
	for path, data := range map[string][]byte{
		at(composeEtcd, "ca.crt"):              etcd.pem,
		at(composeProxy, "etcd-ca.crt"):        etcd.pem,
		at(composeProxy, "client-ca.crt"):      proxy.pem,
		at(composeClient, "ca.crt"):            proxy.pem,
		at(composeClient, "kube-ca.crt"):       kube.pem,
		at(composeClient, "kubeconfig"):        []byte(composeKubeconfig),
		at(composeKubernetes, "etcd-ca.crt"):   proxy.pem,
		at(composeKubernetes, "client-ca.crt"): kube.pem,
	} {
		if err := writeAtomically(path, data); err != nil {
			return err
		}
	}
	return newKeyPair(at(composeKubernetes, "service-account.key"), at(composeKubernetes, "service-account.pub"))
}

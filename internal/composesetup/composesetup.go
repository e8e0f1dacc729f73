// Package composesetup creates the files that the project's docker-compose.yml needs: certificates,
// a local key and the configuration of the proxies. It is the work of the command `setup compose`.
package composesetup

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

// The folders: each is a volume, so that each container gets only the keys that it needs.
const (
	caDir         = "ca"         // the authorities' keys; mounted by the job alone
	etcdDir       = "etcd"       // the three members
	proxyDir      = "proxy"      // the proxies: configuration, local key, certificates
	clientDir     = "client"     // clients of the proxies and of kube-apiserver
	kubernetesDir = "kubernetes" // kube-apiserver
)

// settings are those of the KMS in the environment.
type settings struct {
	Kind        string // local or alibaba
	Region      string
	KeyID       string
	Endpoint    string
	Credentials string
	// Local says that there is a local key, so that its values stay readable.
	Local bool
}

// configTemplate is the configuration of the proxies. Texts from the environment need no quoting:
// readSettings checks them.
var configTemplate = template.Must(template.New("config.yaml").Parse(`# Written by "etcd-kms-proxy setup compose" at each start, from .env: changes here are lost.
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

// kubeconfig is for users of this machine. The files that it names are in the same folder.
const kubeconfig = `apiVersion: v1
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

// Run creates all files below dir. getenv returns variables of the environment.
func Run(dir string, getenv func(string) string, now time.Time) error {
	for _, name := range []string{caDir, etcdDir, proxyDir, clientDir, kubernetesDir} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	// First, so that a mistake in the settings changes nothing.
	kms, err := readSettings(dir, getenv)
	if err != nil {
		return err
	}
	if kms.Kind == "local" && !kms.Local {
		if err := refuseLostKey(dir); err != nil {
			return err
		}
		if err := local.NewKeyFile(filepath.Join(dir, proxyDir, "key.yaml")); err != nil {
			return err
		}
		kms.Local = true
	}
	if err := makeCertificates(dir, now); err != nil {
		return err
	}
	var text bytes.Buffer
	if err := configTemplate.Execute(&text, kms); err != nil {
		return err
	}
	// Last, so that a proxy with a configuration has all files that it names.
	return writeChanged(filepath.Join(dir, proxyDir, "config.yaml"), text.Bytes())
}

// refuseLostKey fails if a member of etcd has data: a new key could not decrypt it, and writes with
// that key would hide the loss.
func refuseLostKey(dir string) error {
	for _, member := range []string{"etcd-1", "etcd-2", "etcd-3"} {
		entries, err := os.ReadDir(filepath.Join(dir, member))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if len(entries) > 0 {
			return problem.New("restore the key file from its backup; to start without the data, remove etcd's volumes too (`docker compose down --volumes`)", "%s has data, and the local key that it was encrypted with is gone: there is no %s", member, filepath.Join(dir, proxyDir, "key.yaml"))
		}
	}
	return nil
}

// readSettings reads the environment, and checks it against the result of an earlier run.
func readSettings(dir string, getenv func(string) string) (*settings, error) {
	folder := filepath.Join(dir, proxyDir)
	exists := func(name string) (bool, error) {
		_, err := os.Stat(filepath.Join(folder, name))
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	}
	kms := &settings{
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
			return nil, problem.New("set KMS=alibaba in .env, or remove the others", "KMS is local, and ALIBABA_KMS_REGION or ALIBABA_KMS_KEY_ID is set")
		}
		before, err := os.ReadFile(filepath.Join(folder, "config.yaml")) //nolint:gosec // the operator names the folder
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if bytes.Contains(before, []byte("\n  writeWith: alibaba\n")) {
			return nil, problem.New("restore .env next to docker-compose.yml, as deploy/compose/alibaba.env.example shows, and start again", "this stack encrypts with Alibaba Cloud KMS, and the environment does not name it: is .env missing?")
		}
		return kms, nil
	case "alibaba":
	default:
		return nil, problem.New("write KMS=local or KMS=alibaba in .env", "KMS is %q", kms.Kind)
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
		return nil, problem.New("write accessKey, sts or ecsRAMRole", "ALIBABA_KMS_CREDENTIALS is %q", kms.Credentials)
	}
	var missing []string
	for _, name := range required {
		if getenv(name) == "" {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return nil, problem.New("copy deploy/compose/alibaba.env.example to .env next to docker-compose.yml and fill it in", "KMS is alibaba, and nothing is set for %s", strings.Join(missing, ", "))
	}
	for name, text := range map[string]string{"ALIBABA_KMS_REGION": kms.Region, "ALIBABA_KMS_KEY_ID": kms.KeyID, "ALIBABA_KMS_ENDPOINT": kms.Endpoint} {
		if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
			return nil, problem.New("write it in .env as Alibaba Cloud shows it, without quotes", "%s holds white space, quotes or control characters", name)
		}
	}
	return kms, nil
}

// makeCertificates makes the three authorities and all certificates.
func makeCertificates(dir string, now time.Time) error {
	at := func(folder, name string) string { return filepath.Join(dir, folder, name) }
	authorities := make(map[string]*authority)
	for _, name := range []string{"etcd", "proxy", "kubernetes"} {
		var err error
		if authorities[name], err = openAuthority(at(caDir, name+".crt"), at(caDir, name+".key"), "etcd-kms-proxy compose "+name, now); err != nil {
			return err
		}
	}
	etcd, proxy, kube := authorities["etcd"], authorities["proxy"], authorities["kubernetes"]
	serves, calls := x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth
	for _, c := range []struct {
		by     *authority
		folder string
		name   string
		leaf   leaf
	}{
		{etcd, etcdDir, "etcd-1", leaf{subject: pkix.Name{CommonName: "etcd-1"}, names: []string{"etcd-1", "localhost", "127.0.0.1"}, usages: []x509.ExtKeyUsage{serves, calls}}},
		{etcd, etcdDir, "etcd-2", leaf{subject: pkix.Name{CommonName: "etcd-2"}, names: []string{"etcd-2", "localhost", "127.0.0.1"}, usages: []x509.ExtKeyUsage{serves, calls}}},
		{etcd, etcdDir, "etcd-3", leaf{subject: pkix.Name{CommonName: "etcd-3"}, names: []string{"etcd-3", "localhost", "127.0.0.1"}, usages: []x509.ExtKeyUsage{serves, calls}}},
		// Without a common name, which etcd would use as a user name once its authentication is on.
		{etcd, proxyDir, "etcd-client", leaf{subject: pkix.Name{Organization: []string{"etcd-kms-proxy"}}, usages: []x509.ExtKeyUsage{calls}}},
		{proxy, proxyDir, "server", leaf{subject: pkix.Name{CommonName: "etcd-kms-proxy"}, names: []string{"proxy-1", "proxy-2", "localhost", "127.0.0.1"}, usages: []x509.ExtKeyUsage{serves}}},
		{proxy, clientDir, "client", leaf{subject: pkix.Name{CommonName: "client"}, usages: []x509.ExtKeyUsage{calls}}},
		{proxy, kubernetesDir, "etcd-client", leaf{subject: pkix.Name{CommonName: "kube-apiserver"}, usages: []x509.ExtKeyUsage{calls}}},
		{kube, kubernetesDir, "server", leaf{
			subject: pkix.Name{CommonName: "kube-apiserver"}, usages: []x509.ExtKeyUsage{serves},
			names: []string{"kube-apiserver", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "127.0.0.1", "10.96.0.1"},
		}},
		{kube, clientDir, "kube-admin", leaf{subject: pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}, usages: []x509.ExtKeyUsage{calls}}},
	} {
		if err := c.by.issue(at(c.folder, c.name+".crt"), at(c.folder, c.name+".key"), c.leaf, now); err != nil {
			return err
		}
	}
	for path, data := range map[string][]byte{
		at(etcdDir, "ca.crt"):              etcd.pem,
		at(proxyDir, "etcd-ca.crt"):        etcd.pem,
		at(proxyDir, "client-ca.crt"):      proxy.pem,
		at(clientDir, "ca.crt"):            proxy.pem,
		at(clientDir, "kube-ca.crt"):       kube.pem,
		at(clientDir, "kubeconfig"):        []byte(kubeconfig),
		at(kubernetesDir, "etcd-ca.crt"):   proxy.pem,
		at(kubernetesDir, "client-ca.crt"): kube.pem,
	} {
		if err := writeChanged(path, data); err != nil {
			return err
		}
	}
	return newKeyPair(at(kubernetesDir, "service-account.key"), at(kubernetesDir, "service-account.pub"))
}

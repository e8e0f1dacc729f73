package plugins

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// subject is a public plugin, as its page in docs/plugins describes it. Each field is a claim of
// that page.
type subject struct {
	name string // of the binary, after kms-plugin-
	page string // in docs/plugins
	// keyID matches the whole key ID in every value.
	keyID string
	// rotation says what a rotation needs, and whether the key ID shows it.
	rotation rotation
	// rotatedReads is whether values from before the rotation can be read after it.
	rotatedReads bool
	// everyAddress is set for a plugin that cannot be kept from listening on all addresses.
	everyAddress bool
	// code is the gRPC code of Decrypt with a disabled key.
	code string
	// unusable is what kms check says, because nothing can be encrypted; "" if the plugin works.
	unusable string

	start func(t *testing.T, env *harness.Env) *running
}

type rotation string

const (
	seen    rotation = "seen"    // a new key ID, without a restart of the plugin
	hidden  rotation = "hidden"  // the vendor uses a new version, and the key ID stays
	restart rotation = "restart" // a new key ID, with the plugin started again
)

// running is a plugin with the vendor's side of it.
type running struct {
	socket string
	// rotate, disable and outage act on the vendor. A nil function has no counterpart there.
	rotate  func()
	disable func(bool)
	outage  func(bool)
}

// plugin is one process that can be started again.
type plugin struct {
	t      *testing.T
	env    *harness.Env
	name   string
	socket string
	proc   *harness.Process
}

// run starts the plugin. In args, SOCKET stands for the path of the socket.
func run(t *testing.T, env *harness.Env, name string, args ...string) *plugin {
	t.Helper()
	p := &plugin{t: t, env: env, name: name, socket: filepath.Join(env.Dir, name+".sock")}
	p.again(args...)
	return p
}

// again starts the plugin, the first time or with other arguments.
func (p *plugin) again(args ...string) {
	p.t.Helper()
	if p.proc != nil {
		p.proc.Kill()
	}
	if err := os.Remove(p.socket); err != nil && !os.IsNotExist(err) {
		p.t.Fatal(err)
	}
	full := make([]string, len(args))
	for i, arg := range args {
		full[i] = strings.ReplaceAll(arg, "SOCKET", p.socket)
	}
	p.proc = p.env.StartProcess("kms-plugin-"+p.name, binary(p.t, p.name), full...)
}

func binary(t *testing.T, name string) string {
	return filepath.Join(harness.BinDir(t), "kms-plugin-"+name)
}

// http returns what is running before a vendor's HTTP API.
func (p *plugin) http(t *testing.T, v *vendor) *running {
	return &running{socket: p.socket, rotate: func() { v.rotate(t) }, disable: v.setDisabled, outage: v.setOutage}
}

const (
	awsKey    = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	googleKey = "projects/example/locations/global/keyRings/ring/cryptoKeys/kms"
	someUUID  = "5c1f3b8e-6a0d-4b0e-9a43-2f1f0a6a7c11"
	otherUUID = "0d9b7a64-7c1f-4c56-8b0f-0b7e4d9a2e55"
)

func subjects() []subject {
	return []subject{
		{name: "age", page: "age.md", keyID: `[0-9a-f]{64}`, rotation: restart, rotatedReads: true, start: startAge},
		{name: "aws", page: "aws.md", keyID: regexp.QuoteMeta(awsKey), rotation: hidden, rotatedReads: true, code: "Unknown", start: startAWS},
		{name: "barbican", page: "barbican.md", keyID: otherUUID, rotation: "", code: "Unknown", start: startBarbican},
		{
			name: "google", page: "google.md", keyID: regexp.QuoteMeta(googleKey) + `/cryptoKeyVersions/[0-9]+`, rotation: seen, rotatedReads: true,
			code: "Unknown", start: startGoogle,
		},
		{name: "hsm", page: "pkcs11.md", keyID: `[0-9a-f]{16}`, rotation: restart, start: startHSM},
		{name: "mock", page: "pkcs11.md", keyID: "kms-test", start: startMock},
		{name: "ovh", page: "ovh.md", keyID: otherUUID, rotation: hidden, rotatedReads: true, code: "Unknown", start: startOVH},
		{name: "stackit", unusable: "the KMS returned another key than was wrapped", start: startStackit},
		{name: "vault", page: "vault.md", keyID: `[0-9]+`, rotation: seen, rotatedReads: true, code: "Unknown", everyAddress: true, start: startVault},
	}
}

func startAge(t *testing.T, env *harness.Env) *running {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	second, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-socket", "SOCKET", "-identity", env.File("identity", []byte(identity.String()+"\n")), "-recipients", env.File("recipients", []byte(identity.Recipient().String()+"\n"))}
	p := run(t, env, "age", args...)
	return &running{socket: p.socket, rotate: func() {
		env.File("recipients", []byte(identity.Recipient().String()+"\n"+second.Recipient().String()+"\n"))
		p.again(args...)
	}}
}

func startAWS(t *testing.T, env *harness.Env) *running {
	v := newVendor(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	p := run(t, env, "aws", "--listen", "SOCKET", "--key", awsKey, "--region", "eu-central-1", "--kms-endpoint", serve(t, v.aws(awsKey)), "--health-port", harness.FreeAddress(t))
	return p.http(t, v)
}

func startVault(t *testing.T, env *harness.Env) *running {
	v := newVendor(t)
	p := run(t, env, "vault", "-socket", "unix://SOCKET", "-vault-address", serve(t, v.transit), "-auth-method", "token", "-token", "token", "-health-port", fmt.Sprint(harness.FreePort(t)))
	return p.http(t, v)
}

func startGoogle(t *testing.T, env *harness.Env) *running {
	v := newVendor(t)
	at, err := url.Parse(serve(t, v.google(googleKey)))
	if err != nil {
		t.Fatal(err)
	}
	p := run(t, env, "google", "--path-to-unix-socket", "SOCKET", "--key-uri", googleKey, "--integration-test", "--fake-kms-port", at.Port(),
		"--healthz-port", fmt.Sprint(harness.FreePort(t)), "--metrics-port", fmt.Sprint(harness.FreePort(t)), "--logtostderr")
	return p.http(t, v)
}

func startBarbican(t *testing.T, env *harness.Env) *running {
	v := newVendor(t)
	var base string
	base = serve(t, v.openstack(func() string { return base }, otherUUID, []byte("0123456789abcdef0123456789abcdef")))
	config := fmt.Sprintf("[Global]\nauth-url = %s/v3\nusername = user\npassword = word\ndomain-name = Default\ntenant-id = %s\nregion = R\n\n[KeyManager]\nkey-id = %s\n", base, someUUID, otherUUID)
	p := run(t, env, "barbican", "--socketpath", "SOCKET", "--cloud-config", env.File("cloud.conf", []byte(config)))
	r := p.http(t, v)
	r.rotate = nil
	return r
}

func startOVH(t *testing.T, env *harness.Env) *running {
	v := newVendor(t)
	ca := env.NewCA("ovh")
	client := ca.Client("plugin", "plugin")
	at := serveTLS(t, ca, v.ovh(someUUID, otherUUID))
	p := run(t, env, "ovh", "--protocol", "rest", "--serv-addr", at, "--okms-id", someUUID, "--encryption-key-id", otherUUID,
		"--client-cert", client.CertFile, "--client-key", client.KeyFile, "--ca", ca.File, "--sock", "SOCKET")
	return p.http(t, v)
}

// startStackit has the plugin connect to its vendor's fixed address through a forward proxy of the
// test, which answers in the vendor's place.
func startStackit(t *testing.T, env *harness.Env) *running {
	v := newVendor(t)
	ca := env.NewCA("stackit")
	pair := ca.Server("vendor", "kms.api.eu01.qa.stackit.cloud")
	t.Setenv("SSL_CERT_FILE", ca.File)
	t.Setenv("HTTPS_PROXY", serveForward(t, pair, v.stackit))
	t.Setenv("STACKIT_SERVICE_ACCOUNT_TOKEN", "token")
	t.Setenv("STACKIT_REGION", "eu01")
	p := run(t, env, "stackit", "-listen", "SOCKET", "-key", "project/ring/key/1")
	return p.http(t, v)
}

// softHSM makes a token with an AES key and returns the path of the PKCS#11 library.
func softHSM(t *testing.T, env *harness.Env, label string) string {
	t.Helper()
	library := "/usr/lib/softhsm/libsofthsm2.so"
	for _, need := range []string{library, "/usr/bin/softhsm2-util", "/usr/bin/pkcs11-tool"} {
		if _, err := os.Stat(need); err != nil {
			t.Skipf("%v: it needs Debian's softhsm2 and opensc", err)
		}
	}
	tokens := filepath.Join(env.Dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", env.File("softhsm2.conf", []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n")))
	for _, args := range [][]string{
		{"softhsm2-util", "--init-token", "--free", "--label", "kms", "--pin", "1234", "--so-pin", "1234"},
		{"pkcs11-tool", "--module", library, "--keygen", "--key-type", "aes:32", "--pin", "1234", "--token-label", "kms", "--label", label},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	return library
}

func startHSM(t *testing.T, env *harness.Env) *running {
	library := softHSM(t, env, "kek-1")
	args := func(label string) []string {
		return []string{"--pkcs11-lib", library, "--token-label", "kms", "--pin", "1234", "--key-label", label, "--socket", "SOCKET"}
	}
	p := run(t, env, "hsm", args("kek-1")...)
	return &running{socket: p.socket, rotate: func() { p.again(args("kek-2")...) }}
}

func startMock(t *testing.T, env *harness.Env) *running {
	library := softHSM(t, env, "kms-test")
	config, err := json.Marshal(object{"path": library, "tokenLabel": "kms", "pin": "1234"})
	if err != nil {
		t.Fatal(err)
	}
	p := run(t, env, "mock", "--listen-addr", "unix://SOCKET", "--config-file-path", env.File("softhsm.json", config))
	return &running{socket: p.socket}
}

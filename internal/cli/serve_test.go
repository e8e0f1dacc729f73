package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// addressOf reads the address out of the log line with a message.
func addressOf(t *testing.T, s *running, msg string) string {
	t.Helper()
	var line struct {
		Address string `json:"address"`
	}
	if err := json.Unmarshal([]byte(s.logged(`"msg":"`+msg+`"`)), &line); err != nil {
		t.Fatal(err)
	}
	if line.Address == "" {
		t.Fatal(errNoAddress)
	}
	return line.Address
}

// get fetches a page of the admin server.
func get(t *testing.T, s *running, path string) (int, string) {
	t.Helper()
	client := &http.Client{Timeout: clitest.Deadline, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + addressOf(t, s, "admin serving") + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	clitest.Told.Output(body)
	return resp.StatusCode, string(body)
}

// silentEtcd has nothing stored for the proxy itself. It accepts every other call and answers none
// until the test ends. arrived gets one element for each.
func silentEtcd(t *testing.T) (address string, arrived chan struct{}) {
	t.Helper()
	arrived = make(chan struct{}, 16)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		asked := new(etcdserverpb.RangeRequest)
		if err := stream.RecvMsg(asked); err == nil && strings.HasPrefix(string(asked.Key), "/etcd-kms-proxy/") {
			return stream.SendMsg(&etcdserverpb.RangeResponse{Header: &etcdserverpb.ResponseHeader{}})
		}
		arrived <- struct{}{}
		<-stream.Context().Done()
		return stream.Context().Err()
	}))
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() { s.Stop(); <-served })
	return l.Addr().String(), arrived
}

// hang makes a call through the proxy that does not end, and returns a channel with its error.
func hang(t *testing.T, s *running, arrived <-chan struct{}) <-chan error {
	t.Helper()
	conn, err := grpc.NewClient(addressOf(t, s, "listening"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ended := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), clitest.Deadline)
		defer cancel()
		_, err := etcdserverpb.NewKVClient(conn).Range(ctx, &etcdserverpb.RangeRequest{Key: []byte("k")})
		ended <- err
	}()
	select {
	case <-arrived:
	case err := <-ended:
		t.Fatalf("the call ended early: %v", err)
	case <-time.After(clitest.Deadline):
		t.Fatal("the call does not arrive")
	}
	return ended
}

func TestServeDrains(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			s := start(t, clitest.NewDir(t).Config(t))
			addressOf(t, s, "listening")
			addressOf(t, s, "admin serving")
			s.signal(sig)
			s.logged(`"msg":"draining`)
			s.exited(0)
			s.logged(`"msg":"stopped"`)
			if strings.Contains(s.text(), `"msg":"serving"`) {
				t.Error("without etcd, no rules were compared, and it says that it serves")
			}
		})
	}
}

func TestDrainTimeoutCutsWhatIsLeft(t *testing.T) {
	etcd, arrived := silentEtcd(t)
	s := start(t, clitest.NewDir(t).Config(t, "127.0.0.1:1]", etcd+"]\ncoordination: {enabled: false}"), "--drain-timeout", "300ms")
	call := hang(t, s, arrived)
	s.logged(`"msg":"serving"`)
	s.signal(syscall.SIGTERM)
	s.signal(syscall.SIGINT) // an echo of the first
	s.exited(0)
	if err := <-call; err == nil {
		t.Error("the call that was cut has no error")
	}
}

func TestSecondSignalExitsAtOnce(t *testing.T) {
	etcd, arrived := silentEtcd(t)
	s := start(t, clitest.NewDir(t).Config(t, "127.0.0.1:1]", etcd+"]\ncoordination: {enabled: false}"), "--drain-timeout", "1h")
	hang(t, s, arrived)
	s.signal(syscall.SIGTERM)
	s.logged(`"msg":"draining`)
	if !s.running() {
		t.Fatal("serve did not wait for the call")
	}
	clitest.Eventually(t, "exit", func() bool {
		_ = s.cmd.Process.Signal(syscall.SIGTERM) // an error is its exit
		return !s.running()
	})
	s.exited(3)
}

func TestPortInUse(t *testing.T) {
	d := clitest.NewDir(t)
	taken := clitest.Occupy(t)
	execute(t, "serve", "--config", d.Config(t, "- address: 127.0.0.1:0", "- address: "+taken)).
		want(t, 3, "error: listener "+taken, "address already in use", "hint: another process listens there")
	execute(t, "serve", "--config", d.Config(t, `"127.0.0.1:0"`, taken)).
		want(t, 3, "error: admin: ", "address already in use", "hint: another process listens there")
}

func TestAuditLogInUse(t *testing.T) {
	d := clitest.NewDir(t)
	l, err := auditlog.Open(auditlog.Config{Path: d.Path("audit.jsonl")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	execute(t, "serve", "--config", d.Config(t, "kind: ", "audit: {path: audit.jsonl}\nkind: ")).
		want(t, 3, "error: audit log ", "another process writes it", "hint: is a proxy with this configuration running?")
}

// TestOpenAdmin: an admin server that other machines reach is said at the start, and that of the
// default is not. The address is off loopback and no machine has it.
func TestOpenAdmin(t *testing.T) {
	d := clitest.NewDir(t)
	const warning = "the admin server has no authentication"
	r := execute(t, "serve", "--config", d.Config(t, `admin: {address: "127.0.0.1:0"}`, `admin: {address: "192.0.2.1:0"}`))
	r.want(t, 3, `"level":"WARN"`, warning, `"line":13`)
	s := start(t, d.Config(t))
	s.logged("admin serving")
	if strings.Contains(s.text(), warning) {
		t.Error("a warning of an address on loopback")
	}
}

// TestSocketFolder: a socket that cannot be made is told by the folder, and not by the name that it
// has for a moment.
func TestSocketFolder(t *testing.T) {
	d := clitest.NewDir(t)
	missing, closed := d.Path("missing"), d.Path("closed")
	if err := os.Mkdir(closed, 0o500); err != nil {
		t.Fatal(err)
	}
	try := func(folder string, texts ...string) {
		t.Helper()
		r := execute(t, "serve", "--config", d.Config(t, "- address: 127.0.0.1:0", "- address: unix://"+folder+"/etcd.sock"))
		r.want(t, 3, append(texts, "error: listener unix://"+folder+"/etcd.sock: ")...)
		if strings.Contains(r.stderr, "/.k") {
			t.Errorf("it tells of a name that nobody has written: %s", r.stderr)
		}
	}
	try(missing, ": its folder "+missing+" does not exist\nhint: create it for the user of the proxy")
	if os.Getuid() != 0 { // who may write everywhere
		try(closed, "permission denied", "hint: check that the user the proxy runs as may use this")
	}
}

// TestServesWithKMSDown: a rule that cannot serve is named, and the proxy stays ready for the rest.
// Etcd is unreachable too, which is said.
func TestServesWithKMSDown(t *testing.T) {
	d := clitest.NewDir(t)
	s := start(t, d.Config(t,
		"kms:\n", "kms:\n- name: down\n  plugin: {endpoint: 'unix://"+d.Path("none.sock")+"', timeout: 100ms}\n",
		"rules:\n", "rules:\n- {prefix: /down/, writeWith: down}\n"))
	s.logged("etcd is unreachable")
	clitest.Eventually(t, "report of the rule that works", func() bool {
		_, page := get(t, s, "/readyz")
		return strings.Contains(page, `[+]rule "/registry/secrets/" ok`)
	})
	code, page := get(t, s, "/readyz")
	if code != http.StatusOK {
		t.Errorf("readyz: HTTP %d", code)
	}
	for _, text := range []string{`[-]rule "/down/": `, "[-]kms down: ", "[+]kms dev", "[+]listeners", "[-]etcd", "readyz check passed"} {
		if !strings.Contains(page, text) {
			t.Errorf("readyz has no %q:\n%s", text, page)
		}
	}
	if code, page := get(t, s, "/livez"); code != http.StatusOK {
		t.Errorf("livez: HTTP %d: %s", code, page)
	}
	_, page = get(t, s, "/metrics")
	for _, text := range []string{
		`etcd_kms_proxy_kms_healthy{provider="dev"} 1`, `etcd_kms_proxy_kms_healthy{provider="down"} 0`, `etcd_kms_proxy_kms_can_encrypt{provider="dev"} 1`,
		`etcd_kms_proxy_values_encrypted_total{outcome="ok",rule="/registry/secrets/"} 0`, `etcd_kms_proxy_seed_events_total{event="generated",provider="dev"} 1`,
		`etcd_kms_proxy_kms_operations_total{class="ok",operation="Status",provider="dev"}`,
		`etcd_kms_proxy_kms_operations_total{class="unavailable",operation="Status",provider="down"}`,
		`etcd_kms_proxy_kms_operation_duration_seconds_count{`, `etcd_kms_proxy_seed_cache_entries `, `etcd_kms_proxy_kms_key_info{key_id="`,
		`etcd_kms_proxy_config_reloads_total{outcome="applied"} 0`, `etcd_kms_proxy_build_info{`, "go_goroutines", "process_cpu_seconds_total",
	} {
		if !strings.Contains(page, text) {
			t.Errorf("metrics have no %q", text)
		}
	}
	if code, _ := get(t, s, "/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("pprof without pprof: true: HTTP %d", code)
	}
	s.signal(syscall.SIGTERM)
	s.exited(0)
}

func TestNoCoreDumps(t *testing.T) {
	if _, err := os.Stat("/proc/self/limits"); err != nil {
		t.Skip("needs Linux' /proc")
	}
	s := start(t, clitest.NewDir(t).Config(t))
	addressOf(t, s, "listening")
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Fields(rest)[1] != "0" {
			t.Errorf("core limit: %s", line)
		}
	}
	if strings.Contains(s.text(), "core dumps") {
		t.Error("the log says that core dumps are not turned off")
	}
}

func TestReload(t *testing.T) {
	d := clitest.NewDir(t)
	config := d.Config(t)
	s := start(t, config)
	addressOf(t, s, "listening")
	rules := func() string {
		_, page := get(t, s, "/readyz")
		return page
	}

	// A file that changed is noticed.
	d.Config(t, "rules:\n", "rules:\n- {prefix: /new/, writeWith: dev}\n")
	s.logged("configuration reloaded", `"trigger":"changed file"`, `"rules":2`)
	if page := rules(); !strings.Contains(page, `rule "/new/" ok`) {
		t.Errorf("readyz does not know the new rule:\n%s", page)
	}
	s.signal(syscall.SIGHUP)
	s.logged("configuration reloaded", `"trigger":"SIGHUP"`)

	// A file with problems changes nothing.
	d.Config(t, "writeWith: dev", "writeWith: gone")
	s.logged("not reloaded", `"path":"rules[0].writeWith"`, `"line":12`, "hint")

	// Nor does one that protects less.
	d.Config(t)
	s.logged("would protect keys less", `keys below \"/new/\" would have no rule`, "--allow-weakening")
	if page := rules(); !strings.Contains(page, `rule "/new/" ok`) {
		t.Errorf("the rule went in spite of the refusal:\n%s", page)
	}
	for _, outcome := range []string{`applied"} 2`, `failed"} 1`, `refused"} 1`} {
		clitest.Eventually(t, outcome, func() bool {
			_, page := get(t, s, "/metrics")
			return strings.Contains(page, `etcd_kms_proxy_config_reloads_total{outcome="`+outcome)
		})
	}

	// What needs a restart is named, and the rest applied.
	d.Config(t, "rules:\n", "rules:\n- {prefix: /new/, writeWith: dev}\n", "level: debug", "level: warn", "cache", "", "kind: ProxyConfiguration", "kind: ProxyConfiguration\ncache: {seeds: 5}")
	s.logged("need a restart", `"blocks":["cache"]`)

	// A rule for a provider that is not running cannot be applied.
	d.Config(t, "rules:\n", "- {name: more, local: {keyFile: key.yaml}}\nrules:\n- {prefix: /new/, writeWith: more, readWith: [dev]}\n")
	s.logged("not reloaded", "more", "is running", `"changed":["kms"]`, "restart the proxy")

	s.signal(syscall.SIGTERM)
	s.exited(0)
}

func TestReloadMayWeakenWhenAllowed(t *testing.T) {
	d := clitest.NewDir(t)
	s := start(t, d.Config(t), "--allow-weakening")
	addressOf(t, s, "listening")
	d.Config(t, "writeWith: dev", "writeWith: plaintext")
	s.logged("protects keys less than before", `would be written as plaintext`)
	s.logged("configuration reloaded", `"rules":1`)
	s.signal(syscall.SIGTERM)
	s.exited(0)
}

func TestTextLogAndWarnings(t *testing.T) {
	s := start(t, clitest.NewDir(t).Config(t, "level: debug", "format: text", "rules:\n- prefix: /registry/secrets/\n  writeWith: dev\n", "",
		"address: 127.0.0.1:0\netcd", "address: 0.0.0.0:0\n  insecurePlaintext: true\netcd"))
	s.logged("level=INFO", "msg=listening")
	s.logged("level=WARN", "there are no rules")
	s.logged("level=WARN", "insecurePlaintext")
	s.signal(syscall.SIGTERM)
	s.exited(0)
}

// TestUserWithEtcdDown: the user's token is asked for when there is something to ask etcd, so that
// nothing waits for etcd without an end.
func TestUserWithEtcdDown(t *testing.T) {
	d := clitest.NewDir(t)
	if err := os.WriteFile(d.Path("password"), []byte("pw\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := d.Config(t, "127.0.0.1:1]", "127.0.0.1:1]\n  username: root\n  passwordFile: password")
	s := start(t, config)
	s.logged("etcd is unreachable", "connection refused")
	if code, page := get(t, s, "/readyz"); code != http.StatusOK || !strings.Contains(page, "[-]etcd") {
		t.Errorf("readyz: HTTP %d: %s", code, page)
	}
	executeAlone(t, "status", "--config", config, "--timeout", "200ms").want(t, 3, "error: etcd is unreachable at http://127.0.0.1:1: ", "connection refused")
	s.signal(syscall.SIGTERM)
	s.exited(0)
}

// TestWaitingForEtcd: a command that waits for etcd says so after two seconds, with the endpoint
// and the reason, and continues until its timeout.
func TestWaitingForEtcd(t *testing.T) {
	for name, args := range map[string][]string{
		"status": {"status"},
		"verify": {"verify"},
		"drill":  {"drill", "--lost", "dev"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begun := time.Now()
			r := executeAlone(t, append(args, "--config", clitest.NewDir(t).Config(t), "--timeout", "4s")...)
			r.want(t, 3, "waiting for etcd at http://127.0.0.1:1: ", "error: etcd is unreachable at http://127.0.0.1:1: ")
			if strings.Count(r.stderr, "connection refused") != 2 || strings.Count(r.stderr, "waiting for etcd") != 1 {
				t.Errorf("standard error: %s", r.stderr)
			}
			if waited := time.Since(begun); waited < 4*time.Second {
				t.Errorf("gave up after %v", waited)
			}
			quick := executeAlone(t, append(args, "--config", clitest.NewDir(t).Config(t), "--timeout", "500ms")...)
			if quick.want(t, 3, "error: etcd is unreachable"); strings.Contains(quick.stderr, "waiting") {
				t.Errorf("standard error of a short wait: %s", quick.stderr)
			}
		})
	}
}

// TestLogReaderGone: the reader of the log may end before the proxy.
func TestLogReaderGone(t *testing.T) {
	d := clitest.NewDir(t)
	cmd := process("serve", "--config", d.Config(t))
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(clitest.Deadline, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	lines := bufio.NewScanner(stderr)
	for lines.Scan() && !strings.Contains(lines.Text(), "etcd is unreachable") {
	}
	_ = stderr.Close()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil { // which is logged
		t.Fatal(err)
	}
	_ = cmd.Wait() // its code says it
	if code := cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("%v, want a drain and exit code 0", cmd.ProcessState)
	}
}

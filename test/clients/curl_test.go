package clients

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// TestCurl compares what a shell gets from the JSON gateway, including every header.
func TestCurl(t *testing.T) {
	t.Parallel()
	needs(t, "apt-get install curl", "curl", "--version")
	for name, pair := range map[string]func(*testing.T, string) *pair{"cleartext": newPair, "TLS": newTLSPair} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := &curl{pair: pair(t, "3.7"), dir: t.TempDir()}
			c.proxy.RecordTested("curl")
			c.values(t)
			c.transports(t)
			c.streams(t)
			c.sealed(t)
			c.users(t)
		})
	}
}

type curl struct {
	*pair
	dir string
}

// reply is what curl printed for one response.
type reply struct {
	Code   string // exit code of curl; 0 is success
	Status string
	Header []string
	Body   any // decoded JSON, or text
}

// different lists headers that differ between two responses, because the JSON contains random
// spaces, and the headers for scripts of other origins, which the proxy does not send. Over TLS,
// etcd's gateway also forwards all headers of its gRPC server; responses of the proxy itself do not
// have these.
var different = map[bool]*regexp.Regexp{
	false: regexp.MustCompile(`(?i)^(date|content-length|access-control-allow-[a-z]+): `),
	true:  regexp.MustCompile(`(?i)^(date|content-length|access-control-allow-[a-z]+|grpc-metadata-[a-z-]+): `),
}

// encoded is replaced by the base64 of its text, like $(echo -n … | base64) in a shell.
var encoded = regexp.MustCompile(`‹[^›]*›`)

func (c *curl) expand(s string) string {
	s = strings.ReplaceAll(s, "%s", c.Sealed.Value("curl"))
	return encoded.ReplaceAllStringFunc(s, func(m string) string {
		return base64.StdEncoding.EncodeToString([]byte(strings.TrimSuffix(strings.TrimPrefix(m, "‹"), "›")))
	})
}

// command sends a request for path to base.
func (c *curl) command(ctx context.Context, base, path string, args ...string) *exec.Cmd {
	all := []string{"-q", "-sS", "--max-time", "60", "-i", "--http1.1"}
	if c.ca != nil {
		all = append(all, "--cacert", c.ca.File, "--cert", c.client.CertFile, "--key", c.client.KeyFile)
	}
	for _, a := range args {
		all = append(all, c.expand(a))
	}
	all = append(all, base+path) // not to args, which two servers are asked with at the same time
	cmd := exec.CommandContext(ctx, "curl", all...)
	cmd.Dir = c.dir
	return cmd
}

func (c *curl) ask(t *testing.T, base, path string, args ...string) reply {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := c.command(t.Context(), base, path, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Errorf("curl %s: %v", path, err)
		return reply{}
	}
	r := reply{Code: fmt.Sprint(cmd.ProcessState.ExitCode())}
	// The number of spaces in errors of protobuf depends on the build.
	head, body, _ := strings.Cut(strings.ReplaceAll(out.String(), "\u00a0", " "), "\r\n\r\n")
	for strings.HasPrefix(head, "HTTP/1.1 1") || strings.HasPrefix(head, "HTTP/2 1") { // 100, 101
		head, body, _ = strings.Cut(body, "\r\n\r\n")
	}
	lines := strings.Split(head, "\r\n")
	r.Status, r.Header = lines[0], slices.DeleteFunc(lines[1:], different[c.ca != nil].MatchString)
	slices.Sort(r.Header)
	if r.Body = body; json.Valid([]byte(body)) {
		_ = json.Unmarshal([]byte(body), &r.Body) // the JSON is valid
	}
	return r
}

// both compares the responses of the two servers.
func (c *curl) both(t *testing.T, path string, args ...string) reply {
	t.Helper()
	var want reply
	var bare sync.WaitGroup
	bare.Go(func() { want = c.ask(t, c.bare.URL, path, args...) })
	got := c.ask(t, c.proxy.URL(), path, args...)
	bare.Wait()
	if w, g := fmt.Sprintf("%q", want), fmt.Sprintf("%q", got); w != g {
		t.Errorf("curl %.300q %s\nbare etcd: %.1500s\nthe proxy: %.1500s", args, path, w, g)
	}
	return got
}

func (c *curl) values(t *testing.T) {
	for _, r := range [][2]string{
		{"kv/put", `{"key":"‹a›","value":"‹%s›"}`}, {"kv/put", `{"key": "‹a›", "value": "‹%s-2›", "prev_kv": true}`}, {"kv/put", `{"key":"‹b›"}`},
		{"kv/range", `{"key":"‹a›"}`}, {"kv/range", `{"key":"‹a›","range_end":"‹c›","sort_target":"VALUE","sort_order":2}`}, {"kv/range", `{"key":"AA==","range_end":"AA==","keys_only":true}`},
		{"kv/range", `{"key":"‹a›","revision":2}`}, {"kv/range", `{"key":"‹a›","revision":"99"}`}, {"kv/range", `{"key":"‹a›","nonsense":1}`}, {"kv/range", `{"key":"a"}`}, {"kv/range", `{`}, {"kv/range", ``},
		{"kv/txn", `{"compare":[{"key":"‹a›","target":"VALUE","value":"‹%s-2›"}],"success":[{"requestPut":{"key":"‹a›","value":"‹%s-3›"}}],"failure":[{"requestRange":{"key":"‹a›"}}]}`},
		{"kv/txn", `{"compare":[{"key":"‹a›","target":"VALUE","result":"LESS","value":"‹%s-3›"}],"success":[{"request_delete_range":{"key":"‹a›"}}],"failure":[{"request_range":{"key":"‹a›"}}]}`},
		{"kv/deleterange", `{"key":"‹b›","prev_kv":true}`}, {"kv/compaction", `{"revision":3}`}, {"kv/compaction", `{"revision":3}`},
		{"lease/grant", `{"TTL":600,"ID":7}`}, {"lease/grant", `{"TTL":600,"ID":7}`}, {"kv/put", `{"key":"‹leased›","value":"‹%s›","lease":7}`}, {"lease/keepalive", `{"ID":7}`}, {"lease/leases", ``},
		{"lock/lock", `{"name":"‹lock›","lease":7}`}, {"lock/unlock", `{"key":"‹lock/7›"}`},
		{"election/campaign", `{"name":"‹election›","lease":7,"value":"‹%s›"}`}, {"election/leader", `{"name":"‹election›"}`},
		{"lease/revoke", `{"ID":7}`}, {"election/leader", `{"name":"‹election›"}`}, {"kv/range", `{"key":"‹leased›"}`},
		{"maintenance/alarm", `{}`}, {"nothing", `{}`}, {"kv/nothing", `{}`},
	} {
		c.both(t, "/v3/"+r[0], "-d", r[1])
	}
	got := c.both(t, "/v3/kv/range", "-d", `{"key":"‹a›"}`)
	if kvs, _ := json.Marshal(got.Body); !bytes.Contains(kvs, []byte(c.expand(`"‹%s-3›"`))) {
		t.Errorf("the value has not come through: %s", kvs)
	}
}

// transports tests how a request is sent, not what it requests.
func (c *curl) transports(t *testing.T) {
	const put, get = `{"key":"‹t›","value":"‹%s›"}`, `{"key":"‹t›"}`
	large := c.expand(`{"key":"‹large›","value":"‹` + strings.Repeat("%s", 30<<10) + `›"}`)
	tooLarge := c.expand(`{"key":"‹large›","value":"‹` + strings.Repeat("%s", 80<<10) + `›"}`)
	for name, data := range map[string]string{"put": c.expand(put), "get": c.expand(get), "large": large, "too-large": tooLarge} {
		if err := os.WriteFile(filepath.Join(c.dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.both(t, "/v3/kv/put", "-d", put)
	for _, args := range [][]string{
		{"-d", "@put"}, {"--data-binary", "@get"}, {"-H", "Content-Type: application/json", "-d", get}, {"-H", "Content-Type: text/plain", "-d", get}, {"-H", "Content-Type: application/grpc", "-d", get},
		{"-H", "Transfer-Encoding: chunked", "-d", "@put"}, {"-H", "Accept-Encoding: gzip", "-d", get}, {"-H", "Accept: text/html", "-d", get}, {"-H", "Host: localhost", "-d", get}, {"-H", "Host: 192.0.2.1:2379", "-d", get}, {"-H", "User-Agent:", "-d", get},
		{"-H", "Expect: 100-continue", "-d", "@put"}, {"--data-binary", "@too-large"}, {"-T", "put"}, {"-X", "PUT", "-d", put}, {"-G", "-d", "key=‹t›"}, {"-I"}, {"-X", "DELETE"},
		{"-H", "Grpc-Timeout: 10S", "-d", get}, {"-H", "Grpc-Timeout: nonsense", "-d", get}, {"-H", "Grpc-Metadata-hasleader: true", "-d", get}, {"-H", "Authorization: nonsense", "-d", get}, {"-H", "Connection: close", "-d", get},
		{"-F", "key=‹t›"}, {"-0", "-d", get}, {"-0", "-H", "Host:", "-d", get}, {"-X", "OPTIONS"},
	} {
		c.both(t, "/v3/kv/range", args...)
	}
	if got := c.both(t, "/v3/kv/put", "--data-binary", "@large"); !strings.HasSuffix(got.Status, " 200 OK") {
		t.Errorf("%.500v", got)
	}
	c.both(t, "/v3/kv/put", "--data-binary", "@too-large")
	for _, path := range []string{"/health", "/health?serializable=true", "/livez", "/readyz", "/version", "/", "/v3", "/v3/", "/v2/keys/", "/v3//kv/range", "/v3/kv/../kv/range", "/v3beta/kv/range", "/v3alpha/kv/range"} {
		c.both(t, path, "--path-as-is")
		c.both(t, path, "--path-as-is", "-d", get)
		c.both(t, path, "--path-as-is", "-X", "OPTIONS")
	}
	for _, method := range []string{"POST", "PUT", "OPTIONS"} {
		want, got := c.ask(t, c.bare.URL, "/metrics", "-X", method), c.ask(t, c.proxy.URL(), "/metrics", "-X", method)
		if want.Status != got.Status || fmt.Sprint(want.Header) != fmt.Sprint(got.Header) {
			t.Errorf("%s /metrics\nbare etcd: %s %q\nthe proxy: %s %q", method, want.Status, want.Header, got.Status, got.Header)
		}
	}
	// The proxy implements the protection against browsers itself.
	for _, r := range [][2]string{
		{"Host: elsewhere.example", "421"}, {"Origin: http://elsewhere.example", "403"}, {"Sec-Fetch-Site: cross-site", "403"}, {"User-Agent: Mozilla/5.0", "415"},
	} {
		for _, path := range []string{"/v3/kv/range", "/v3beta/kv/range"} {
			if got := c.ask(t, c.proxy.URL(), path, "-H", r[0], "-d", get); !strings.HasPrefix(got.Status, "HTTP/1.1 "+r[1]) {
				t.Errorf("%s: %v", r[0], got)
			}
		}
	}
	if c.ca == nil {
		// an upgrade, which etcd does not accept
		c.both(t, "/v3/kv/range", "--http2", "-d", get)
		// the client port serves only gRPC and resets the stream; curl may notice either
		for _, base := range []string{c.bare.URL, c.proxy.URL()} {
			if r := c.ask(t, base, "/v3/kv/range", "--http2-prior-knowledge", "-d", get); r.Code != "92" && !strings.HasPrefix(r.Status, "HTTP/2 415") || r.Body != "" {
				t.Errorf("HTTP/2 without TLS at %s: %v", base, r)
			}
		}
		return
	}
	c.both(t, "/health", "--tls-max", "1.1")
	c.both(t, "/health", "--tls-max", "1.2")
	c.both(t, "/health", "--cacert", "/dev/null")
	for _, version := range []string{"--http2", "--http2-prior-knowledge", "--no-alpn"} {
		if got := c.both(t, "/v3/kv/range", version, "-d", get); !strings.Contains(got.Status, " 200") || strings.HasPrefix(got.Status, "HTTP/2") != (version != "--no-alpn") {
			t.Errorf("%s: %v", version, got)
		}
		for _, args := range [][]string{{"-d", "@put"}, {"--data-binary", "@large"}, {"--data-binary", "@too-large"}, {"-X", "PUT", "-d", put}, {"-X", "OPTIONS"}, {"-I"}, {"-d", "{"}, {"-H", "Expect: 100-continue", "-d", "@put"}} {
			c.both(t, "/v3/kv/put", append(args, version)...)
		}
		for _, path := range []string{"/health", "/version", "/livez", "/readyz", "/nothing"} {
			c.both(t, path, version)
			c.both(t, path, version, "-d", get)
		}
		if got := c.ask(t, c.proxy.URL(), "/metrics", version); !strings.Contains(got.Status, " 200") {
			t.Errorf("%s /metrics: %s", version, got.Status)
		}
	}
}

// streams checks that lines arrive as events happen, and not only with later ones.
func (c *curl) streams(t *testing.T) {
	watch := func(base string) (lines []any) {
		ctx, cancel := context.WithCancel(t.Context())
		cmd := c.command(ctx, base, "/v3/watch", "--no-include", "-N", "-d", `{"create_request":{"key":"‹watched›","prev_kv":true}}{"create_request":{"key":"‹w›","range_end":"‹x›","filters":["NODELETE"],"watch_id":"9"}}`)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			cancel()
			_, _ = io.Copy(io.Discard, out)
			_ = cmd.Wait() // the test killed it
		}()
		read := bufio.NewReader(out)
		next := func() {
			t.Helper()
			line, err := read.ReadBytes('\n')
			var decoded any
			if err != nil || json.Unmarshal(line, &decoded) != nil {
				t.Fatalf("watch: %q, %v", line, err)
			}
			lines = append(lines, decoded)
		}
		next() // both watches are created
		next()
		for _, r := range [][2]string{{"put", `{"key":"‹watched›","value":"‹%s›"}`}, {"put", `{"key":"‹watched›","value":"‹%s-2›"}`}, {"deleterange", `{"key":"‹watched›"}`}} {
			c.ask(t, base, "/v3/kv/"+r[0], "-d", r[1])
			if next(); r[0] == "put" { // both watches see the event, in either order
				next()
				slices.SortFunc(lines[len(lines)-2:], func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
			}
		}
		return lines
	}
	want, got := watch(c.bare.URL), watch(c.proxy.URL())
	if w, g := fmt.Sprint(want), fmt.Sprint(got); w != g || !strings.Contains(g, c.expand("‹%s-2›")) {
		t.Errorf("a watch\nbare etcd: %s\nthe proxy: %s", w, g)
	}
	snapshot, err := c.command(t.Context(), c.proxy.URL(), "/v3/maintenance/snapshot", "--no-include", "-d", "{}").Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []byte
	for line := range bytes.Lines(snapshot) {
		var chunk struct{ Result struct{ Blob []byte } }
		if err := json.Unmarshal(line, &chunk); err != nil {
			t.Fatal(err)
		}
		all = append(all, chunk.Result.Blob...)
	}
	if bytes.Contains(all, []byte(c.Sealed.Marker())) || !bytes.Contains(all, []byte(sealedPrefix)) {
		t.Errorf("the snapshot, of %d bytes, is not ciphertext", len(all))
	}
}

// users passes a token in a header.
func (c *curl) users(t *testing.T) {
	for _, r := range [][2]string{
		{"user/add", `{"name":"root","password":"root-password"}`}, {"user/add", `{"name":"reader","password":"reader-password"}`}, {"role/add", `{"name":"root"}`}, {"role/add", `{"name":"readers"}`},
		{"role/grant", `{"name":"readers","perm":{"permType":"READ","key":"‹a›"}}`}, {"user/grant", `{"user":"root","role":"root"}`}, {"user/grant", `{"user":"reader","role":"readers"}`}, {"enable", `{}`},
	} {
		c.both(t, "/v3/auth/"+r[0], "-d", r[1])
	}
	requests := [][2]string{
		{"kv/range", `{"key":"‹a›"}`}, {"kv/range", `{"key":"‹t›"}`}, {"kv/put", `{"key":"‹a›","value":"‹%s›"}`},
		{"kv/txn", `{"compare":[{"key":"‹a›","target":"VALUE","result":"GREATER","value":"‹%s›"}],"success":[{"request_range":{"key":"‹a›"}}]}`}, {"auth/user/list", `{}`},
	}
	for _, r := range requests {
		c.both(t, "/v3/"+r[0], "-d", r[1])
	}
	for _, user := range []string{"reader", "root"} {
		token := func(base string) string {
			body, _ := c.ask(t, base, "/v3/auth/authenticate", "-d", fmt.Sprintf(`{"name":%q,"password":"%s-password"}`, user, user)).Body.(map[string]any)
			return fmt.Sprint("Authorization: ", body["token"])
		}
		bare, proxy := token(c.bare.URL), token(c.proxy.URL())
		for _, r := range requests {
			want, got := c.ask(t, c.bare.URL, "/v3/"+r[0], "-H", bare, "-d", r[1]), c.ask(t, c.proxy.URL(), "/v3/"+r[0], "-H", proxy, "-d", r[1])
			if w, g := fmt.Sprintf("%q", want), fmt.Sprintf("%q", got); w != g {
				t.Errorf("%s, %s\nbare etcd: %s\nthe proxy: %s", user, r[0], w, g)
			}
		}
	}
}

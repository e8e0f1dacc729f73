package differential

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// exchanged is what an HTTP client sees of one response.
type exchanged struct {
	Status      int
	ContentType string
	Body        any // decoded JSON, or sorted lines
}

// TestGateway requests every path of etcd's JSON gateway and etcd's other HTTP paths, and compares
// the responses.
func TestGateway(t *testing.T) {
	t.Parallel()
	for _, version := range harness.Versions(t) {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, version, ruleSets[0])
			if b.proxy == nil {
				t.Skip("it is about the proxy")
			}
			b.tells(t)
			b.gateway(t)
			b.gatewayWatch(t)
			b.gatewayUsers(t) // turns authentication on
		})
	}
}

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func ask(t *testing.T, method, url, body, token string) exchanged {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", token)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	// as do the texts of protobuf errors
	data = bytes.ReplaceAll(data, []byte("\u00a0"), []byte(" "))
	lines := strings.Split(string(data), "\n")
	slices.Sort(lines) // etcd returns the checks of /readyz?verbose in random order
	e := exchanged{answer.StatusCode, answer.Header.Get("Content-Type"), lines}
	var decoded any
	if json.Unmarshal(data, &decoded) == nil { // etcd's JSON contains random spaces
		e.Body = decoded
	}
	return e
}

// both sends a request to both sides and compares the responses. without names fields that differ
// between any two etcds, and are left out.
func (b *bench) both(t *testing.T, method, path, body, token string, without ...string) exchanged {
	t.Helper()
	want, got := ask(t, method, b.bareEtcd.URL+path, body, token), ask(t, method, "http://"+b.proxy.Address+path, body, token)
	for _, e := range []exchanged{want, got} {
		if m, ok := e.Body.(map[string]any); ok {
			for _, w := range without {
				delete(m, w)
			}
		}
	}
	row, _, _ := strings.Cut(method+" "+path, "?")
	absent := want.Status == http.StatusNotFound && strings.HasPrefix(path, "/v3/")
	if !reflect.DeepEqual(want, got) && (b.version >= "3.6" || !absent && !want.fails(got)) {
		t.Errorf("%s %s %.200s\nbare etcd: %.2000s\nthe proxy: %.2000s", method, path, body, fmt.Sprint(want), fmt.Sprint(got))
		return got
	}
	b.tested[row] = b.tested[row] || !absent
	return got
}

// fails reports whether two responses are errors for the same reason. The gateway of etcd before
// 3.6 returns errors in another style, some with another HTTP status, and has other texts for
// errors of JSON and HTTP. The proxy has the gateway of 3.7 whatever version etcd has.
func (e exchanged) fails(other exchanged) bool {
	if e.Status < 400 || other.Status < 400 {
		return false
	}
	reason := func(e exchanged) [2]any {
		m, _ := e.Body.(map[string]any)
		return [2]any{m["code"], m["message"]}
	}
	a, b := reason(e), reason(other)
	return a == b || a[0] == nil || strings.HasPrefix(fmt.Sprint(a[1]), "json: ")
}

func (b *bench) gateway(t *testing.T) {
	value := b64(b.env.Sealed.Value("over JSON"))
	key, end := b64("/s/json"), b64("/s/jsoo")
	post := func(path, body string, without ...string) exchanged {
		return b.both(t, "POST", "/v3/"+path, body, "", without...)
	}
	post("kv/put", fmt.Sprintf(`{"key":%q,"value":%q}`, key, value))
	post("kv/put", fmt.Sprintf(`{"key":%q,"value":%q,"prev_kv":true}`, key, value))
	post("kv/range", fmt.Sprintf(`{"key":%q,"range_end":%q}`, key, end))
	post("kv/range", fmt.Sprintf(`{"key":%q,"sort_target":"VALUE","sort_order":"DESCEND"}`, key))
	txn := `{"compare":[{"key":%q,"target":"VALUE","value":%q,"result":"EQUAL"}],"success":[{"request_put":{"key":%q,"value":%q}}],"failure":[{"request_range":{"key":%q}}]}`
	if a := post("kv/txn", fmt.Sprintf(txn, key, value, key, b64(b.env.Sealed.Value("other")), key)); !strings.Contains(fmt.Sprint(a.Body), "succeeded:true") {
		t.Errorf("a transaction over JSON: %v", a)
	}
	post("kv/txn", fmt.Sprintf(txn, key, value, key, value, key))
	post("kv/deleterange", fmt.Sprintf(`{"key":%q,"prev_kv":true}`, key))
	post("kv/compaction", `{"revision":"2"}`)
	post("kv/compaction", `{"revision":"1000000"}`)
	post("kv/rangestream", fmt.Sprintf(`{"key":%q}`, key))
	post("lease/grant", `{"ID":"77","TTL":"600"}`)
	post("lease/timetolive", `{"ID":"77","keys":true}`, "ttl", "TTL")
	post("kv/lease/timetolive", `{"ID":"77"}`, "ttl", "TTL")
	post("lease/keepalive", `{"ID":"77"}`)
	// Errors must not be logged with the request: the harness searches the proxy's log. etcd itself
	// would log it.
	ask(t, "POST", "http://"+b.proxy.Address+"/v3/lease/keepalive", fmt.Sprintf(`{"ID":%q}`, b.env.Sealed.Value("no number")), "")
	post("lease/leases", `{}`)
	post("kv/lease/leases", `{}`)
	post("lease/revoke", `{"ID":"77"}`)
	post("kv/lease/revoke", `{"ID":"78"}`)
	post("maintenance/alarm", `{"action":"GET"}`)
	post("maintenance/status", `{}`, "dbSize", "dbSizeInUse", "raftIndex", "raftAppliedIndex", "dbSizeQuota")
	post("maintenance/hash", `{}`, "hash")
	post("maintenance/hashkv", `{}`, "hash")
	post("maintenance/defragment", `{}`)
	post("maintenance/transfer-leadership", `{"targetID":"1"}`)
	post("maintenance/downgrade", `{"action":"VALIDATE","version":"3.6"}`)
	post("cluster/member/promote", `{"ID":"1"}`)
	post("cluster/member/remove", `{"ID":"1"}`)
	post("cluster/member/update", `{"ID":"1","peerURLs":["http://127.0.0.1:1"]}`)
	post("cluster/member/add", `{"peerURLs":[]}`)
	name := b64("/s/elected")
	post("election/campaign", fmt.Sprintf(`{"name":%q,"lease":"77","value":%q}`, name, value))
	post("election/leader", fmt.Sprintf(`{"name":%q}`, name))
	post("election/proclaim", `{}`)
	post("election/resign", `{}`)
	post("lock/lock", fmt.Sprintf(`{"name":%q,"lease":"77"}`, name))
	post("lock/unlock", fmt.Sprintf(`{"key":%q}`, name))
	post("auth/status", `{}`)
	post("auth/enable", `{}`)
	post("auth/disable", `{}`)
	post("auth/authenticate", `{"name":"nobody","password":"wrong"}`)
	for _, path := range []string{"user/add", "user/get", "user/list", "user/delete", "user/changepw", "user/grant", "user/revoke", "role/add", "role/get", "role/list", "role/delete", "role/grant", "role/revoke"} {
		post("auth/"+path, `{}`)
	}
	// Invalid requests.
	post("kv/range", `not JSON`)
	post("kv/range", `{"key":7}`)
	post("kv/range", `{"unknown":"field","key":"AA=="}`)
	post("kv/range", ``)
	post("kv/put", fmt.Sprintf(`{"key":%q,"value":%q}`, key, b64(strings.Repeat("v", 1600<<10))))
	post("kv/nothing", `{}`)
	b.both(t, "GET", "/v3/kv/range", "", "")
	b.both(t, "DELETE", "/v3/kv/range", "", "")
	b.both(t, "GET", "/v4/", "", "")
	b.both(t, "GET", "/nothing", "", "")
	// Paths other than the gateway.
	for _, path := range []string{"/health", "/health?serializable=true", "/livez", "/readyz", "/readyz?verbose", "/livez/serializable_read", "/version", "/readyz/nothing"} {
		b.both(t, "GET", path, "", "")
	}
	b.both(t, "POST", "/health", "", "")
	if a := ask(t, "GET", "http://"+b.proxy.Address+"/metrics", "", ""); a.Status != http.StatusOK || !strings.Contains(fmt.Sprint(a.Body), "etcd_server_has_leader 1") {
		t.Errorf("/metrics: %d", a.Status)
	}
	b.tested["GET /metrics"] = true
	b.gatewayStreams(t)
	if a := ask(t, "POST", "http://"+b.proxy.Address+"/v3/kv/put", strings.Repeat(" ", 6<<20), ""); a.Status < 400 {
		t.Errorf("a body of 6 MiB: %v", a)
	}
}

// gatewayWatch watches over JSON, and compares the lines.
func (b *bench) gatewayWatch(t *testing.T) {
	value := b64(b.env.Sealed.Value("watched"))
	watch := func(base string) []any {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, "POST", base+"/v3/watch", strings.NewReader(fmt.Sprintf(`{"create_request":{"key":%q,"prev_kv":true}}`, b64("/s/watched"))))
		if err != nil {
			t.Fatal(err)
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		lines := bufio.NewReader(answer.Body)
		var seen []any
		next := func() {
			line, err := lines.ReadBytes('\n')
			var decoded any
			if err != nil || json.Unmarshal(line, &decoded) != nil {
				t.Fatalf("watch: %q, %v", line, err)
			}
			seen = append(seen, decoded)
		}
		next() // the watch was created
		for range 2 {
			ask(t, "POST", base+"/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":%q}`, b64("/s/watched"), value), "")
			next()
		}
		ask(t, "POST", base+"/v3/kv/deleterange", fmt.Sprintf(`{"key":%q}`, b64("/s/watched")), "")
		next()
		return seen
	}
	if want, got := watch(b.bareEtcd.URL), watch("http://"+b.proxy.Address); !reflect.DeepEqual(want, got) {
		t.Errorf("a watch over JSON\nbare etcd: %v\nthe proxy: %v", want, got)
		return
	}
	b.tested["POST /v3/watch"] = true
}

// gatewayStreams compares responses that differ between any two etcds, or have several parts, in
// what they have in common.
func (b *bench) gatewayStreams(t *testing.T) {
	alike := func(path, body string, what func(*json.Decoder) any) {
		t.Helper()
		var seen []any
		for _, base := range []string{b.bareEtcd.URL, "http://" + b.proxy.Address} {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			r, err := http.NewRequestWithContext(ctx, "POST", base+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			answer, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			seen = append(seen, what(json.NewDecoder(answer.Body)))
			answer.Body.Close()
			cancel()
		}
		if !reflect.DeepEqual(seen[0], seen[1]) {
			t.Errorf("%s\nbare etcd: %v\nthe proxy: %v", path, seen[0], seen[1])
			return
		}
		b.tested["POST "+path] = true
	}
	alike("/v3/cluster/member/list", `{}`, func(lines *json.Decoder) any {
		var a struct{ Members []struct{ ID string } }
		if err := lines.Decode(&a); err != nil || len(a.Members) != 1 {
			t.Errorf("members: %v, %v", a, err)
		}
		return a
	})
	alike("/v3/maintenance/snapshot", `{}`, func(lines *json.Decoder) any {
		size := 0
		for lines.More() {
			var a struct{ Result struct{ Blob []byte } }
			if err := lines.Decode(&a); err != nil {
				t.Errorf("snapshot after %d bytes: %v", size, err)
				break
			}
			size += len(a.Result.Blob)
		}
		return size > 16<<10
	})
	name, value := b64("/s/observed"), b64(b.env.Sealed.Value("observed"))
	for _, base := range []string{b.bareEtcd.URL, "http://" + b.proxy.Address} {
		ask(t, "POST", base+"/v3/lease/grant", `{"ID":"79","TTL":"600"}`, "")
		ask(t, "POST", base+"/v3/election/campaign", fmt.Sprintf(`{"name":%q,"lease":"79","value":%q}`, name, value), "")
	}
	alike("/v3/election/observe", fmt.Sprintf(`{"name":%q}`, name), func(lines *json.Decoder) any {
		var a struct {
			Result struct{ KV struct{ Key, Value string } }
		}
		if err := lines.Decode(&a); err != nil || a.Result.KV.Value != value {
			t.Errorf("observe: %v, %v", a, err)
		}
		return a
	})
}

// gatewayUsers checks that tokens and permission errors of etcd's users work.
func (b *bench) gatewayUsers(t *testing.T) {
	post := func(path, body string) { b.both(t, "POST", "/v3/"+path, body, "") }
	post("auth/user/add", `{"name":"root","password":"root-password"}`)
	post("auth/user/add", `{"name":"reader","password":"reader-password"}`)
	post("auth/role/add", `{"name":"root"}`)
	post("auth/role/add", `{"name":"reader"}`)
	post("auth/role/grant", fmt.Sprintf(`{"name":"reader","perm":{"permType":"READ","key":%q,"range_end":%q}}`, b64("/s/"), b64("/s0")))
	post("auth/user/grant", `{"user":"root","role":"root"}`)
	post("auth/user/grant", `{"user":"reader","role":"reader"}`)
	post("auth/enable", `{}`)
	value := b64(b.env.Sealed.Value("guarded"))
	put := fmt.Sprintf(`{"key":%q,"value":%q}`, b64("/s/guarded"), value)
	get := fmt.Sprintf(`{"key":%q}`, b64("/s/guarded"))
	for _, user := range []string{"", "wrong", "root", "reader"} {
		tokens := []string{user, user}
		if user == "root" || user == "reader" {
			for i, base := range []string{b.bareEtcd.URL, "http://" + b.proxy.Address} {
				a := ask(t, "POST", base+"/v3/auth/authenticate", fmt.Sprintf(`{"name":%q,"password":"%s-password"}`, user, user), "")
				body, _ := a.Body.(map[string]any)
				tokens[i], _ = body["token"].(string)
				if tokens[i] == "" {
					t.Fatalf("authenticate %s: %v", user, a)
				}
			}
		}
		compare := fmt.Sprintf(`{"compare":[{"key":%q,"target":"VALUE","value":%q}],"success":[{"request_put":%s}]}`, b64("/s/guarded"), value, put)
		for _, request := range [][2]string{{"kv/put", put}, {"kv/range", get}, {"kv/txn", compare}, {"auth/user/list", `{}`}} {
			want := ask(t, "POST", b.bareEtcd.URL+"/v3/"+request[0], request[1], tokens[0])
			got := ask(t, "POST", "http://"+b.proxy.Address+"/v3/"+request[0], request[1], tokens[1])
			if !reflect.DeepEqual(want, got) && (b.version >= "3.6" || !want.fails(got)) {
				t.Errorf("%q, %s\nbare etcd: %v\nthe proxy: %v", user, request[0], want, got)
			}
		}
	}
}

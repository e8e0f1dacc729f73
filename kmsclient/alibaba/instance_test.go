package alibaba

import (
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// newInstanceWorld returns a KMS that knows nobody but the sessions of an instance's role, and a
// backend on that instance.
func newInstanceWorld(t *testing.T, cfg kmsdouble.MetadataConfig, change func(*Config)) (*kmsdouble.Double, *kmsdouble.Metadata, *Backend) {
	t.Helper()
	d := kmsdouble.New(t, kmsdouble.Config{AccessKeys: []kmsdouble.AccessKey{}})
	cfg.Register = d.SetAccessKey
	m := kmsdouble.NewMetadata(t, cfg)
	logs := &safeBuffer{}
	c := Config{Region: d.Region(), KeyID: kmsdouble.DefaultKeyID, Endpoint: d.Endpoint(), CAFile: d.CAFile(), Logger: slog.New(slog.NewJSONHandler(logs, nil))}
	c.Credentials = Credentials{Type: ECSRAMRole, MetadataURL: m.URL(), MetadataCAFile: m.CAFile()}
	if change != nil {
		change(&c)
	}
	b, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = b.Close()
		checkNoSession(t, "log", logs.String(), m.LastSession())
	})
	return d, m, b
}

// TestInstanceRole speaks version 2, with and without TLS, and asks for the role's name only if it
// is not configured. No proxy sees any of it.
func TestInstanceRole(t *testing.T) {
	for _, plain := range []bool{false, true} {
		for _, role := range []string{"", kmsdouble.DefaultInstanceRole} {
			t.Run(fmt.Sprint(plain, role), func(t *testing.T) {
				_, m, b := newInstanceWorld(t, kmsdouble.MetadataConfig{Plain: plain}, func(c *Config) { c.Credentials.RoleName = role })
				source, ok := b.creds.(*sessionSource)
				if !ok {
					t.Fatal("no session")
				}
				key := mustDataKey(t, b)
				for op, call := range operations(b, key) {
					if err := call(t.Context()); err != nil {
						t.Errorf("%s: %v", op, err)
					}
				}
				got := fmt.Sprint(m.Calls("PUT token"), m.Calls("GET role"), m.Calls("GET credentials"))
				if want := map[string]string{"": "1 1 1", kmsdouble.DefaultInstanceRole: "1 0 1"}[role]; got != want {
					t.Errorf("calls: %s, want %s", got, want)
				}
				if left := time.Until(source.expires()); left < 5*time.Hour {
					t.Errorf("the session lives for another %v", left)
				}
			})
		}
	}
	// Go keeps loopback addresses from proxies, and reads the environment once; so the pool itself
	// is looked at.
	if pool, err := newMetadataPool(""); err != nil || pool.Proxy != nil {
		t.Errorf("the pool may use a proxy, %v", err)
	}
}

// TestMetadataV1 is spoken only when the operator allows it, and only to a server that gives no
// token.
func TestMetadataV1(t *testing.T) {
	for name, tc := range map[string]struct {
		server kmsdouble.MetadataConfig
		allow  bool
		ok     bool
	}{
		"2":                     {server: kmsdouble.MetadataConfig{}, ok: true},
		"2, 1 allowed":          {server: kmsdouble.MetadataConfig{}, allow: true, ok: true},
		"1 and 2":               {server: kmsdouble.MetadataConfig{V1: true}, ok: true},
		"only 1":                {server: kmsdouble.MetadataConfig{V1Only: true}},
		"only 1, which is fine": {server: kmsdouble.MetadataConfig{V1Only: true}, allow: true, ok: true},
	} {
		t.Run(name, func(t *testing.T) {
			_, m, b := newInstanceWorld(t, tc.server, func(c *Config) { c.Credentials.AllowMetadataV1 = tc.allow })
			_, err := b.GenerateDataKey(t.Context(), "")
			if tc.ok {
				if err != nil {
					t.Error(err)
				}
				return
			}
			e := asError(t, err)
			if e.Class() != kmsclient.ClassDenied || !strings.Contains(e.Detail, "allowMetadataV1") || e.HTTPStatus != http.StatusNotFound {
				t.Errorf("%v", err)
			}
			if n := m.Calls("GET role") + m.Calls("GET credentials"); n != 0 {
				t.Errorf("%d requests without a token", n)
			}
		})
	}
}

// TestNoInstance: with the older protocol allowed, a 404 to everything is the answer of no ECS
// instance, or of one without a role.
func TestNoInstance(t *testing.T) {
	_, m, b := newInstanceWorld(t, kmsdouble.MetadataConfig{}, func(c *Config) { c.Credentials.AllowMetadataV1 = true })
	m.SetFault(http.NotFound)
	_, err := b.GenerateDataKey(t.Context(), "")
	if e := asError(t, err); e.Class() != kmsclient.ClassDenied || !strings.Contains(e.Detail, "no RAM role, or this is no ECS instance") {
		t.Errorf("%v", err)
	}
}

// TestMetadataFaults has the server answer in every wrong way: the class says whether a retry may
// help, and nothing is quoted.
func TestMetadataFaults(t *testing.T) {
	unavailable, contract, denied := kmsclient.ClassUnavailable, kmsclient.ClassContract, kmsclient.ClassDenied
	text := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = w.Write([]byte(body))
		}
	}
	// after answers the token's request with a token, and the others with f.
	after := func(f http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut {
				_, _ = w.Write([]byte("CANARYtoken"))
				return
			}
			f(w, r)
		}
	}
	answer := func(code, id, expiration string) http.HandlerFunc {
		return after(text(200, `{"Code":"`+code+`","AccessKeyId":"`+id+`","AccessKeySecret":"CANARYsecret","SecurityToken":"CANARYtoken","Expiration":"`+expiration+`"}`))
	}
	hang := func(_ http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
		panic(http.ErrAbortHandler) // else the response could still reach the client
	}
	for name, tc := range map[string]struct {
		fault  http.HandlerFunc
		class  kmsclient.Class
		detail string
	}{
		"token, 500":        {text(500, "CANARY"), unavailable, "gave no token"},
		"token, 403":        {text(403, "CANARY"), denied, "allowMetadataV1"},
		"token, 404":        {text(404, "CANARY"), denied, "no ECS instance and something else answers, or one with the older protocol only, which allowMetadataV1 permits"},
		"token, redirect":   {http.RedirectHandler("/elsewhere", http.StatusFound).ServeHTTP, denied, "gave no token"},
		"token, empty":      {text(200, ""), contract, "is none"},
		"token, long":       {text(200, strings.Repeat("CANARY", 300)), contract, "is none"},
		"token, two lines":  {text(200, "CANARY\nX-Canary: y"), contract, "is none"},
		"too large":         {text(200, strings.Repeat("CANARY", 20000)), contract, "64 KiB"},
		"cut":               {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, unavailable, "cannot be reached"},
		"403":               {after(text(403, "CANARY")), denied, "refuses"},
		"404":               {after(text(404, "CANARY")), denied, "no RAM role"},
		"500":               {after(text(500, "CANARY")), unavailable, "now"},
		"no JSON":           {after(text(200, "CANARY")), contract, "not JSON"},
		"null":              {after(text(200, "null")), unavailable, "now"},
		"failed":            {answer("Failed", "CANARYid", "2999-01-01T00:00:00Z"), unavailable, "now"},
		"no id":             {answer("Success", "", "2999-01-01T00:00:00Z"), contract, "lacks"},
		"odd id":            {answer("Success", "CANARY id", "2999-01-01T00:00:00Z"), contract, "malformed"},
		"no end":            {answer("Success", "CANARYid", "soon"), contract, "expire"},
		"ended":             {answer("Success", "CANARYid", "2001-01-01T00:00:00Z"), unavailable, "compare the clocks"},
		"hang":              {after(hang), unavailable, "did not answer in time"},
		"hang at the token": {hang, unavailable, "limit of hops"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, m, b := newInstanceWorld(t, kmsdouble.MetadataConfig{}, func(c *Config) { c.Credentials.RoleName = "role" })
			m.SetFault(tc.fault)
			_, err := b.GenerateDataKey(t.Context(), "")
			if e := asError(t, err); e.Class() != tc.class || !strings.Contains(e.Detail, tc.detail) || name != "ended" && !strings.Contains(e.Detail, m.URL()) {
				t.Errorf("%v, want %v with %q", err, tc.class, tc.detail)
			}
			checkNoCanary(t, "error", allTexts(err))
		})
	}
	t.Run("a role's name that is none", func(t *testing.T) {
		_, m, b := newInstanceWorld(t, kmsdouble.MetadataConfig{}, nil)
		m.SetFault(after(text(200, "../CANARY\n")))
		_, err := b.GenerateDataKey(t.Context(), "")
		if e := asError(t, err); e.Class() != contract || !strings.Contains(e.Detail, "no name of one") {
			t.Error(err)
		}
		checkNoCanary(t, "error", allTexts(err))
	})
	t.Run("nobody there", func(t *testing.T) {
		_, m, b := newInstanceWorld(t, kmsdouble.MetadataConfig{Plain: true}, nil)
		_ = m.Close()
		_, err := b.GenerateDataKey(t.Context(), "")
		if e := asError(t, err); e.Class() != unavailable || !strings.Contains(e.Detail, "this is no ECS instance") {
			t.Error(err)
		}
	})
}

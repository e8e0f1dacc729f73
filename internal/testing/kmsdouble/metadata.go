package kmsdouble

import (
	"cmp"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// DefaultInstanceRole is the role of a metadata double whose Config names none.
const DefaultInstanceRole = "etcd-kms-proxy-instance"

// MetadataConfig describes a double of an ECS instance's metadata server.
type MetadataConfig struct {
	// Role is the instance's role, [DefaultInstanceRole] by default; "-" for none.
	Role string
	// V1 answers requests without a token too, and V1Only knows no tokens.
	V1, V1Only bool
	// Plain is without TLS, as the original is.
	Plain bool
	// Register makes a session known to where it is used, e.g. [Double.SetAccessKey].
	Register func(AccessKey)
	// Lifetime is the life of each session; six hours by default.
	Lifetime time.Duration
	Now      func() time.Time
}

// Metadata is a double of the metadata server, as far as it gives the credentials of the instance's
// role. Unlike the original, each request for them makes a new session. It is safe for concurrent
// use.
type Metadata struct {
	*server
	cfg MetadataConfig

	mu     sync.Mutex
	tokens map[string]time.Time // of version 2, and when each ends
	calls  map[string]int       // by method and path
	fault  http.HandlerFunc
	role   string
	last   AccessKey
}

// NewMetadata starts a metadata double that ends with the test, which fails if a client misused it.
func NewMetadata(tb TB, cfg MetadataConfig) *Metadata {
	tb.Helper()
	m := &Metadata{cfg: cfg, tokens: map[string]time.Time{}, calls: map[string]int{}, role: cmp.Or(cfg.Role, DefaultInstanceRole)}
	if cfg.Now == nil {
		m.cfg.Now = time.Now
	}
	if cfg.Register == nil {
		m.cfg.Register = func(AccessKey) {}
	}
	var err error
	if m.server, err = start("metadatadouble", "", "", cfg.Plain, m.serve); err != nil {
		tb.Fatal(err)
	}
	m.endWith(tb, "metadata")
	return m
}

// SetFault sets what answers requests in place of the double; nil removes it. The request is
// counted all the same.
func (m *Metadata) SetFault(f http.HandlerFunc) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault = f
}

// SetRole gives the instance another role; "-" for none.
func (m *Metadata) SetRole(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.role = name
}

// Calls returns how many requests of "PUT token", "GET role" (the name) or "GET credentials" came.
func (m *Metadata) Calls(what string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.calls[what]
}

// LastSession returns the session that was given last.
func (m *Metadata) LastSession() AccessKey {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

const rolesPath = "/latest/meta-data/ram/security-credentials/"

func (m *Metadata) serve(w http.ResponseWriter, r *http.Request) {
	name, isRole := strings.CutPrefix(r.URL.Path, rolesPath)
	what := r.Method + " " + map[bool]string{true: "role", false: "credentials"}[name == ""]
	if !isRole {
		what = r.Method + " token"
	}
	m.mu.Lock()
	m.calls[what]++
	fault := m.fault
	m.mu.Unlock()
	if r.Header.Get("X-Forwarded-For") != "" || r.Header.Get("Via") != "" || r.URL.RawQuery != "" {
		m.violate("a metadata request came through a proxy, or with a query")
	}
	switch {
	case fault != nil:
		fault(w, r)
	case r.URL.Path == "/latest/api/token" && r.Method == http.MethodPut && !m.cfg.V1Only:
		m.giveToken(w, r)
	case isRole && r.Method == http.MethodGet:
		m.give(w, r, name)
	default:
		http.Error(w, "not found", http.StatusNotFound)
	}
}

func (m *Metadata) giveToken(w http.ResponseWriter, r *http.Request) {
	seconds, err := strconv.Atoi(r.Header.Get("X-aliyun-ecs-metadata-token-ttl-seconds"))
	if err != nil || seconds < 1 || seconds > 21600 {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	token := newUUID()
	m.mu.Lock()
	m.tokens[token] = m.cfg.Now().Add(time.Duration(seconds) * time.Second)
	m.mu.Unlock()
	_, _ = w.Write([]byte(token))
}

func (m *Metadata) give(w http.ResponseWriter, r *http.Request, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.cfg.Now()
	token := r.Header.Get("X-aliyun-ecs-metadata-token")
	if ends, ok := m.tokens[token]; token != "" && (!ok || !now.Before(ends)) || token == "" && !m.cfg.V1 && !m.cfg.V1Only {
		http.Error(w, "forbidden", http.StatusForbidden)
		return
	}
	switch {
	case m.role == "-", name != "" && name != m.role:
		http.Error(w, "not found", http.StatusNotFound)
		return
	case name == "":
		_, _ = w.Write([]byte(m.role))
		return
	}
	k := newSession(now.Add(cmp.Or(m.cfg.Lifetime, 6*time.Hour)))
	m.last = k
	m.cfg.Register(k)
	writeJSON(w, http.StatusOK, map[string]any{
		"Code": "Success", "LastUpdated": formatTime(now), "AccessKeyId": k.ID, "AccessKeySecret": k.Secret, "SecurityToken": k.Token,
		"Expiration": formatTime(k.Expires),
	})
}

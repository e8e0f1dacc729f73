package kmsdouble

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The role of an STS double whose Config names none.
const (
	DefaultRoleARN     = "acs:ram::154035569884:role/etcd-kms-proxy"
	DefaultProviderARN = "acs:ram::154035569884:oidc-provider/ack-rrsa-c1"
)

// Role is a role that an STS double lets callers assume.
type Role struct {
	ARN         string
	ExternalID  string        // that AssumeRole must name; "" for any
	ProviderARN string        // whose tokens AssumeRoleWithOIDC takes; "" for none
	MaxDuration time.Duration // of a session; an hour by default
}

// STSConfig describes a double of the Security Token Service. The zero value knows the caller
// [DefaultAccessKeyID] and the role [DefaultRoleARN] with the provider [DefaultProviderARN], and
// its sessions open nothing.
type STSConfig struct {
	Region     string
	AccessKeys []AccessKey
	Roles      []Role
	// Register makes a session known to where it is used, e.g. [Double.SetAccessKey].
	Register func(AccessKey)
	// Lifetime is the life of each session in place of the one that is asked for, which is at least
	// 15 minutes.
	Lifetime           time.Duration
	Now                func() time.Time
	Dir, ListenAddress string
}

// STS is a double of the Security Token Service (Sts, 2015-04-01) with AssumeRole and
// AssumeRoleWithOIDC, over TLS. It verifies what [Double] verifies. A token of OpenID Connect is
// any text that [STS.SetOIDCToken] made known. It is safe for concurrent use.
type STS struct {
	*rpc
	register func(AccessKey)

	rolesMu  sync.Mutex
	roles    map[string]Role
	tokens   map[string]time.Time // when each ends
	lifetime time.Duration
	last     AccessKey
}

// NewSTS starts an STS double that ends with the test, which fails if a client misused it.
func NewSTS(tb TB, cfg STSConfig) *STS {
	tb.Helper()
	s := &STS{register: cfg.Register, roles: map[string]Role{}, tokens: map[string]time.Time{}, lifetime: cfg.Lifetime}
	if s.register == nil {
		s.register = func(AccessKey) {}
	}
	s.rpc = newRPC(newGate("2015-04-01", cfg.Region, cfg.Now, cfg.AccessKeys), s.perform, "OIDCToken", "ExternalId", "Policy")
	if cfg.Roles == nil {
		cfg.Roles = []Role{{ARN: DefaultRoleARN, ProviderARN: DefaultProviderARN}}
	}
	for _, r := range cfg.Roles {
		s.SetRole(r)
	}
	var err error
	if s.server, err = start("stsdouble", cfg.Dir, cfg.ListenAddress, false, s.serve); err != nil {
		tb.Fatal(err)
	}
	s.endWith(tb, "STS")
	return s
}

// SetRole adds or replaces a role.
func (s *STS) SetRole(r Role) {
	s.rolesMu.Lock()
	defer s.rolesMu.Unlock()
	s.roles[r.ARN] = r
}

// RemoveRole deletes a role. Sessions that were given live on here; take them from where they were
// registered.
func (s *STS) RemoveRole(arn string) {
	s.rolesMu.Lock()
	defer s.rolesMu.Unlock()
	delete(s.roles, arn)
}

// SetOIDCToken makes a token of OpenID Connect known, until it expires.
func (s *STS) SetOIDCToken(token string, expires time.Time) {
	s.rolesMu.Lock()
	defer s.rolesMu.Unlock()
	s.tokens[token] = expires
}

// SetLifetime changes the life of the sessions to come; 0 is what is asked for.
func (s *STS) SetLifetime(d time.Duration) {
	s.rolesMu.Lock()
	defer s.rolesMu.Unlock()
	s.lifetime = d
}

// LastSession returns the session that was given last.
func (s *STS) LastSession() AccessKey {
	s.rolesMu.Lock()
	defer s.rolesMu.Unlock()
	return s.last
}

func (s *STS) perform(r *request) (*result, *apiError) {
	switch r.action {
	case "AssumeRole":
		if _, e := s.verify(r.http.Method, r.params); e != nil {
			return nil, e
		}
	case "AssumeRoleWithOIDC":
		if e := s.verifyUnsigned(r.params); e != nil {
			return nil, e
		}
	default:
		return nil, &apiError{404, "InvalidAction.NotFound", "The specified action is not found, please check your URL."}
	}
	s.rolesMu.Lock()
	defer s.rolesMu.Unlock()
	role, ok := s.roles[r.params["RoleArn"]]
	if !ok {
		return nil, &apiError{404, "EntityNotExist.Role", "The specified Role not exists."}
	}
	duration, e := durationOf(r.params, role)
	if e != nil {
		return nil, e
	}
	if r.action == "AssumeRole" {
		e = trusts(role, r.params)
	} else {
		e = s.trustsToken(role, r.params)
	}
	if e != nil {
		return nil, e
	}
	if s.lifetime > 0 {
		duration = s.lifetime
	}
	name := strings.TrimPrefix(role.ARN[strings.LastIndex(role.ARN, "/"):], "/") + ":" + r.params["RoleSessionName"]
	k := newSession(s.now().Add(duration))
	s.last = k
	s.register(k)
	return &result{fields: map[string]any{
		"AssumedRoleUser": map[string]any{"Arn": strings.Replace(role.ARN, ":role/", ":assumed-role/", 1), "AssumedRoleId": "33157794895460****:" + name},
		"Credentials": map[string]any{
			"AccessKeyId": k.ID, "AccessKeySecret": k.Secret, "SecurityToken": k.Token, "Expiration": formatTime(k.Expires),
		},
	}}, nil
}

// newSession makes a session as STS and the metadata server give them. Its end has whole seconds,
// as they have.
func newSession(expires time.Time) AccessKey {
	random := func() string { return strings.ReplaceAll(newUUID(), "-", "") }
	return AccessKey{
		ID: "STS.N" + random()[:24], Secret: random() + random()[:12], Token: "CAIS" + random() + "+/" + random() + "==",
		Expires: expires.Truncate(time.Second),
	}
}

// verifyUnsigned checks what the action without a signature has instead.
func (s *STS) verifyUnsigned(p map[string]string) *apiError {
	for _, name := range []string{"Version", "Timestamp", "RoleArn", "RoleSessionName", "OIDCProviderArn", "OIDCToken"} {
		if p[name] == "" {
			return missing(name)
		}
	}
	for _, name := range []string{"AccessKeyId", "Signature", "SecurityToken"} {
		if p[name] != "" {
			s.violate("AssumeRoleWithOIDC carried %s", name)
		}
	}
	at, err := time.Parse("2006-01-02T15:04:05Z", p["Timestamp"])
	if skew := s.now().Sub(at); err != nil || skew > maxSkew || skew < -maxSkew {
		return &apiError{400, "InvalidTimeStamp.Expired", "Specified time stamp or date value is expired."}
	}
	if p["Version"] != s.version || p["Format"] != "JSON" {
		return invalidParameter("Version")
	}
	return nil
}

var sessionName = regexp.MustCompile(`^[A-Za-z0-9.@_-]{2,64}$`)

func durationOf(p map[string]string, role Role) (time.Duration, *apiError) {
	if !sessionName.MatchString(p["RoleSessionName"]) {
		return 0, &apiError{400, "InvalidParameter.RoleSessionName", "The parameter RoleSessionName is wrongly formed."}
	}
	limit := cmp.Or(role.MaxDuration, time.Hour)
	n, err := strconv.Atoi(cmp.Or(p["DurationSeconds"], "3600"))
	if d := time.Duration(n) * time.Second; err != nil || d < 15*time.Minute || d > limit {
		return 0, &apiError{400, "InvalidParameter.DurationSeconds", fmt.Sprintf("The Min/Max value of DurationSeconds is 15min/%v.", limit)}
	}
	return time.Duration(n) * time.Second, nil
}

func trusts(role Role, p map[string]string) *apiError {
	if role.ExternalID != "" && p["ExternalId"] != role.ExternalID {
		return &apiError{403, "NoPermission", "You are not authorized to do this action. You should be authorized by RAM."}
	}
	return nil
}

// trustsToken is called with s.rolesMu held.
func (s *STS) trustsToken(role Role, p map[string]string) *apiError {
	if role.ProviderARN == "" || p["OIDCProviderArn"] != role.ProviderARN {
		return &apiError{404, "EntityNotExist.OIDCProvider", "The specified OIDC Provider not exists."}
	}
	expires, known := s.tokens[p["OIDCToken"]]
	switch {
	case !known:
		return &apiError{400, "AuthenticationFail.OIDCToken.Invalid", "This OIDC Token is invalid."}
	case !s.now().Before(expires):
		return &apiError{400, "AuthenticationFail.OIDCToken.Expired", "This OIDC Token is expired."}
	}
	return nil
}

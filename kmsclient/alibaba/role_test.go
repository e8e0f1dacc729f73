package alibaba

import (
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

const (
	canaryOIDC     = "eyJhbGciOiJSUzI1NiJ9.CANARYoidc.CANARYoidcCANARYoidc"
	canaryExternal = "CANARYexternalCANARYexternal"
)

// roleWorld is a KMS that knows nobody but the sessions that an STS gives, and a backend whose
// every secret is a canary.
type roleWorld struct {
	kms       *kmsdouble.Double
	sts       *kmsdouble.STS
	backend   *Backend
	logs      *safeBuffer
	tokenFile string // of type oidc
}

// newRoleWorld returns a world for one of the types assumeRole and oidc.
func newRoleWorld(t *testing.T, kind string, change func(*kmsdouble.STSConfig, *Config)) *roleWorld {
	t.Helper()
	w := &roleWorld{logs: &safeBuffer{}}
	w.kms = kmsdouble.New(t, kmsdouble.Config{AccessKeys: []kmsdouble.AccessKey{}})
	cfg := Config{Region: w.kms.Region(), KeyID: kmsdouble.DefaultKeyID, Endpoint: w.kms.Endpoint(), CAFile: w.kms.CAFile()}
	cfg.Logger = slog.New(slog.NewJSONHandler(w.logs, nil))
	cfg.Credentials = Credentials{Type: kind, RoleARN: kmsdouble.DefaultRoleARN, SessionName: "c1@etcd"}
	double := kmsdouble.STSConfig{
		Register:   w.kms.SetAccessKey,
		AccessKeys: []kmsdouble.AccessKey{{ID: canaryID, Secret: canarySecret, Token: canaryToken}},
		Roles:      []kmsdouble.Role{{ARN: kmsdouble.DefaultRoleARN, ProviderARN: kmsdouble.DefaultProviderARN, ExternalID: canaryExternal}},
	}
	if kind == OIDC {
		w.tokenFile = writeFile(t, "token", canaryOIDC+"\n")
		cfg.Credentials.OIDCTokenFile, cfg.Credentials.OIDCProviderARN = w.tokenFile, kmsdouble.DefaultProviderARN
	} else {
		cfg.Credentials.Base, cfg.Credentials.ExternalID = STS, canaryExternal
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", canaryID)
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", canarySecret)
		t.Setenv("ALIBABA_CLOUD_SECURITY_TOKEN", canaryToken)
	}
	if change != nil {
		change(&double, &cfg)
	}
	w.sts = kmsdouble.NewSTS(t, double)
	w.sts.SetOIDCToken(canaryOIDC, time.Now().Add(time.Hour))
	cfg.Credentials.STSEndpoint, cfg.Credentials.STSCAFile = w.sts.Endpoint(), w.sts.CAFile()
	var err error
	if w.backend, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = w.backend.Close()
		checkNoCanary(t, "log", w.logs.String())
		checkNoSession(t, "log", w.logs.String(), w.sts.LastSession())
	})
	return w
}

// checkNoSession fails if a text holds a part of the session.
func checkNoSession(t *testing.T, where, text string, s kmsdouble.AccessKey) {
	t.Helper()
	for _, part := range []string{s.ID, s.Secret, s.Token} {
		if part != "" && strings.Contains(text, part) {
			t.Errorf("%s holds a part of a session: %s", where, text)
		}
	}
}

// action is the operation of STS that a type needs.
func action(kind string) string {
	return map[string]string{AssumeRole: "AssumeRole", OIDC: "AssumeRoleWithOIDC"}[kind]
}

// TestRoleSessions goes from the first call, which waits for its credentials, over many that need
// no more, to Close.
func TestRoleSessions(t *testing.T) {
	for _, kind := range []string{AssumeRole, OIDC} {
		t.Run(kind, func(t *testing.T) {
			w := newRoleWorld(t, kind, func(_ *kmsdouble.STSConfig, c *Config) {
				c.Credentials.Duration = 20 * time.Minute
				c.Credentials.Policy = `{"Version": "1", "Statement": []}`
			})
			if at := w.backend.CredentialsExpire(); !at.IsZero() || w.sts.Calls(action(kind)) != 0 {
				t.Errorf("before the first call: expires %v, %d calls of STS", at, w.sts.Calls(action(kind)))
			}
			key := mustDataKey(t, w.backend)
			for op, call := range operations(w.backend, key) {
				if err := call(t.Context()); err != nil {
					t.Errorf("%s: %v", op, err)
				}
			}
			if n := w.sts.Calls(action(kind)); n != 1 {
				t.Errorf("%d calls of STS", n)
			}
			if left := time.Until(w.backend.CredentialsExpire()); left < 19*time.Minute || left > 20*time.Minute {
				t.Errorf("the session lives for another %v", left)
			}
			for _, r := range w.sts.Records() {
				if !r.Body {
					t.Errorf("%s sent its parameters in the URL", r.Action)
				}
			}
			_ = w.backend.Close()
			_, err := w.backend.GenerateDataKey(t.Context(), "")
			if e := asError(t, err); e.Class() != kmsclient.ClassUnavailable || !strings.Contains(e.Detail, "closed") {
				t.Errorf("after Close: %v", err)
			}
		})
	}
}

// TestRoleFromEnvironment is what a pod gets from ACK's webhook.
func TestRoleFromEnvironment(t *testing.T) {
	w := newRoleWorld(t, OIDC, func(_ *kmsdouble.STSConfig, c *Config) {
		t.Setenv("ALIBABA_CLOUD_ROLE_ARN", kmsdouble.DefaultRoleARN)
		t.Setenv("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", kmsdouble.DefaultProviderARN)
		t.Setenv("ALIBABA_CLOUD_OIDC_TOKEN_FILE", c.Credentials.OIDCTokenFile)
		c.Credentials = Credentials{Type: OIDC}
	})
	mustDataKey(t, w.backend)
}

// TestRoleRefused shows what an operator reads, and that STS is not asked again and again.
func TestRoleRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		kind   string
		spoil  func(*kmsdouble.STSConfig, *Config)
		code   string
		detail string
	}{
		"no such role":        {AssumeRole, func(d *kmsdouble.STSConfig, _ *Config) { d.Roles = []kmsdouble.Role{} }, "EntityNotExist.Role", "there is no such role"},
		"other external ID":   {AssumeRole, func(d *kmsdouble.STSConfig, _ *Config) { d.Roles[0].ExternalID = "x" }, "NoPermission", "trust policy"},
		"unknown caller":      {AssumeRole, func(d *kmsdouble.STSConfig, _ *Config) { d.AccessKeys[0].ID = "LTAIother" }, "InvalidAccessKeyId.NotFound", "the access key is not known"},
		"wrong secret":        {AssumeRole, func(d *kmsdouble.STSConfig, _ *Config) { d.AccessKeys[0].Secret = "other" }, "SignatureDoesNotMatch", "secret is probably wrong"},
		"expired base":        {AssumeRole, func(d *kmsdouble.STSConfig, _ *Config) { d.AccessKeys[0].Expires = time.Unix(1, 0) }, "InvalidSecurityToken.Expired", "expired"},
		"too long a session":  {AssumeRole, func(_ *kmsdouble.STSConfig, c *Config) { c.Credentials.Duration = 2 * time.Hour }, "InvalidParameter.DurationSeconds", "see duration"},
		"clock":               {AssumeRole, func(d *kmsdouble.STSConfig, _ *Config) { d.Now = func() time.Time { return time.Now().Add(time.Hour) } }, "IllegalTimestamp", "clocks"},
		"no such role, OIDC":  {OIDC, func(d *kmsdouble.STSConfig, _ *Config) { d.Roles = []kmsdouble.Role{} }, "EntityNotExist.Role", "there is no such role"},
		"other provider":      {OIDC, func(d *kmsdouble.STSConfig, _ *Config) { d.Roles[0].ProviderARN = "x" }, "EntityNotExist.OIDCProvider", "no such OIDC provider"},
		"unknown OIDC token":  {OIDC, func(_ *kmsdouble.STSConfig, c *Config) { replaceFile(t, c.Credentials.OIDCTokenFile, "CANARY-other") }, "AuthenticationFail.OIDCToken.Invalid", "the OIDC token was refused"},
		"clock, without sign": {OIDC, func(d *kmsdouble.STSConfig, _ *Config) { d.Now = func() time.Time { return time.Now().Add(time.Hour) } }, "InvalidTimeStamp.Expired", "clocks"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newRoleWorld(t, tc.kind, tc.spoil)
			for range 3 {
				_, err := w.backend.GenerateDataKey(t.Context(), "")
				e := asError(t, err)
				if e.Class() != kmsclient.ClassDenied || e.Code != tc.code || !strings.Contains(e.Detail, tc.detail) || e.Op != "GenerateDataKey" ||
					e.RequestID == "" || !strings.Contains(e.Detail, "no credentials: "+action(tc.kind)+" at "+w.sts.Endpoint()) {
					t.Errorf("%v", err)
				}
				checkNoCanary(t, "error", allTexts(err))
			}
			if n := w.sts.Calls(action(tc.kind)); n > 2 { // a second, if a second has passed
				t.Errorf("%d calls of STS", n)
			}
			if n := len(w.kms.Records()); n != 0 {
				t.Errorf("%d calls of the KMS without credentials", n)
			}
		})
	}
}

// TestRoleFaults has STS answer in every wrong way, in both forms: no secret comes out, and the
// class says whether a retry may help.
func TestRoleFaults(t *testing.T) {
	unavailable, contract, denied := kmsclient.ClassUnavailable, kmsclient.ClassContract, kmsclient.ClassDenied
	for name, tc := range map[string]struct {
		fault kmsdouble.FaultSpec
		class kmsclient.Class
	}{
		"throttle":        {kmsdouble.FaultSpec{Kind: kmsdouble.Throttle, Code: "Throttling.User"}, unavailable},
		"500":             {kmsdouble.FaultSpec{Kind: kmsdouble.ServerError, Status: 500, Code: "InternalError"}, unavailable},
		"error of no one": {kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 400, Code: "SomethingNew"}, denied},
		"echo":            {kmsdouble.FaultSpec{Kind: kmsdouble.EchoError, Code: "InvalidParameter"}, denied},
		"echo, 403":       {kmsdouble.FaultSpec{Kind: kmsdouble.EchoError, Status: 403, Code: "NoPermission"}, denied},
		"numeric code":    {kmsdouble.FaultSpec{Kind: kmsdouble.NumericCode}, contract},
		"HTML":            {kmsdouble.FaultSpec{Kind: kmsdouble.HTML}, unavailable},
		"HTML, 502":       {kmsdouble.FaultSpec{Kind: kmsdouble.HTML, Status: 502}, unavailable},
		"empty":           {kmsdouble.FaultSpec{Kind: kmsdouble.EmptyAnswer}, unavailable},
		"redirect":        {kmsdouble.FaultSpec{Kind: kmsdouble.Redirect}, unavailable},
		"too large":       {kmsdouble.FaultSpec{Kind: kmsdouble.TooLarge}, contract},
		"cut":             {kmsdouble.FaultSpec{Kind: kmsdouble.Cut}, unavailable},
		"cut answer":      {kmsdouble.FaultSpec{Kind: kmsdouble.CutAnswer}, unavailable},
		"null":            {kmsdouble.FaultSpec{Kind: kmsdouble.Raw, Body: []byte("null")}, contract},
		"no credentials":  {kmsdouble.FaultSpec{Kind: kmsdouble.PartialAnswer, Fields: []string{"Credentials"}}, contract},
		"array":           {kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{"Credentials": []string{"CANARY"}}}, unavailable},
		"no expiry": {kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{
			"Credentials": map[string]string{"AccessKeyId": "CANARYid", "AccessKeySecret": "CANARYs", "SecurityToken": "CANARYt"},
		}}, contract},
		"spaces": {kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{
			"Credentials": map[string]string{"AccessKeyId": "CANARY id", "AccessKeySecret": "CANARYs", "SecurityToken": "CANARYt", "Expiration": "2999-01-01T00:00:00Z"},
		}}, contract},
		"ended already": {kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{
			"Credentials": map[string]string{"AccessKeyId": "CANARYid", "AccessKeySecret": "CANARYs", "SecurityToken": "CANARYt", "Expiration": "2001-01-01T00:00:00Z"},
		}}, unavailable},
	} {
		for _, kind := range []string{AssumeRole, OIDC} {
			for _, applied := range []bool{false, true} {
				t.Run(name+"/"+kind+map[bool]string{true: "/applied"}[applied], func(t *testing.T) {
					w := newRoleWorld(t, kind, nil)
					fault := tc.fault
					fault.Applied = applied
					w.sts.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &fault })
					_, err := w.backend.GenerateDataKey(t.Context(), "")
					if e := asError(t, err); e.Class() != tc.class || e.Op != "GenerateDataKey" {
						t.Errorf("%v, want %v", err, tc.class)
					}
					text := allTexts(err)
					checkNoCanary(t, "error", text)
					checkNoSession(t, "error", text, w.sts.LastSession())
				})
			}
		}
	}
}

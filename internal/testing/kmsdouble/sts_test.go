package kmsdouble

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"
)

// tb keeps what a double says of its clients from failing the test.
type tb struct{ *testing.T }

func (tb) Errorf(string, ...any) {}

// client trusts one double.
func client(t *testing.T, caFile string) *http.Client {
	t.Helper()
	pem, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// TestSTSIsStrict sends what no client should, each time one thing too many or too few.
func TestSTSIsStrict(t *testing.T) {
	now := time.Now()
	s := NewSTS(tb{t}, STSConfig{})
	s.SetOIDCToken("token", now.Add(time.Minute))
	s.SetOIDCToken("old", now.Add(-time.Minute))
	c := client(t, s.CAFile())
	send := func(query, form map[string]string, change map[string]string) (int, string) {
		t.Helper()
		values := [2]url.Values{{}, {}}
		for i, m := range []map[string]string{query, form} {
			for k, v := range m {
				if w, ok := change[k]; ok {
					v = w
				}
				if v != "" {
					values[i].Set(k, v)
				}
			}
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL()+"/?"+values[0].Encode(), strings.NewReader(values[1].Encode()))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var answer struct{ Code string }
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, answer.Code
	}
	query := map[string]string{"Action": "AssumeRoleWithOIDC", "Version": "2015-04-01", "Format": "JSON", "Timestamp": formatTime(now)}
	form := map[string]string{"RoleArn": DefaultRoleARN, "RoleSessionName": "name", "OIDCProviderArn": DefaultProviderARN, "OIDCToken": "token"}
	if status, code := send(query, form, nil); status != 200 || s.LastSession().ID == "" {
		t.Fatalf("%d %s", status, code)
	}
	if v := s.Violations(); len(v) > 0 {
		t.Errorf("violations: %v", v)
	}
	for name, tc := range map[string]struct {
		change map[string]string
		code   string
	}{
		"signature missing": {map[string]string{"Action": "AssumeRole"}, "MissingAccessKeyId"},
		"other action":      {map[string]string{"Action": "GetCallerIdentity"}, "InvalidAction.NotFound"},
		"other version":     {map[string]string{"Version": "2016-01-20"}, "InvalidParameter"},
		"old request":       {map[string]string{"Timestamp": formatTime(now.Add(-time.Hour))}, "InvalidTimeStamp.Expired"},
		"no role":           {map[string]string{"RoleArn": ""}, "MissingRoleArn"},
		"other role":        {map[string]string{"RoleArn": "acs:ram::1:role/x"}, "EntityNotExist.Role"},
		"session's name":    {map[string]string{"RoleSessionName": "a b"}, "InvalidParameter.RoleSessionName"},
		"other provider":    {map[string]string{"OIDCProviderArn": "acs:ram::1:oidc-provider/x"}, "EntityNotExist.OIDCProvider"},
		"unknown token":     {map[string]string{"OIDCToken": "other"}, "AuthenticationFail.OIDCToken.Invalid"},
		"expired token":     {map[string]string{"OIDCToken": "old"}, "AuthenticationFail.OIDCToken.Expired"},
	} {
		if status, code := send(query, form, tc.change); code != tc.code || status < 400 {
			t.Errorf("%s: %d %s, want %s", name, status, code, tc.code)
		}
	}
	query["OIDCToken"] = "token"
	delete(form, "OIDCToken")
	_, _ = send(query, form, nil)
	if v := s.Violations(); len(v) != 1 || !strings.Contains(v[0], "OIDCToken in the URL") {
		t.Errorf("violations: %v", v)
	}
}

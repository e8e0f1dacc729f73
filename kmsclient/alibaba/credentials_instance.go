package alibaba

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

const (
	metadataURL     = "http://100.100.100.200"
	metadataRoles   = "/latest/meta-data/ram/security-credentials/"
	metadataTime    = 2 * time.Second // of one request
	maxMetadata     = 64 << 10        // bytes of an answer
	metadataTTL     = "60"            // seconds of a token: it is for one fetch
	maxTokenOfV2    = 1 << 10         // bytes of a token; real ones have less than 100
	headerTTL       = "X-Aliyun-Ecs-Metadata-Token-Ttl-Seconds"
	headerToken     = "X-Aliyun-Ecs-Metadata-Token" //nolint:gosec // the name of a header
	opOfMetadata    = "GetInstanceRole"             // an operation of ours, for errors
	metadataVersion = "allowMetadataV1 permits: it has no tokens, so that a forged request can use it too"
)

var roleNamePattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// instanceSource fetches sessions of an ECS instance's role from its metadata server, by version 2
// of its protocol: a PUT gives a token, which the following GETs carry, so that who can only make a
// process fetch a URL gets nothing.
type instanceSource struct {
	url     string
	role    string // "" requests it from the server
	allowV1 bool
	pool    *http.Transport
}

func newInstanceSource(c Credentials, logger *slog.Logger) (*sessionSource, error) {
	m := &instanceSource{url: cmp.Or(c.MetadataURL, metadataURL), role: c.RoleName, allowV1: c.AllowMetadataV1}
	if c.RoleName != "" && !roleNamePattern.MatchString(c.RoleName) {
		return nil, fmt.Errorf("roleName %q is not the name of a RAM role", c.RoleName)
	}
	var err error
	if m.pool, err = newMetadataPool(c.MetadataCAFile); err != nil {
		return nil, err
	}
	return newSessionSource(logger, m.fetch, func() []string { return nil }, m.pool.CloseIdleConnections), nil
}

// newMetadataPool returns connections that use no proxy, whatever the environment says: the address
// has a meaning on this machine only, and the answer is secret.
func newMetadataPool(caFile string) (*http.Transport, error) {
	pool, err := newPool(caFile, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	t := pool.transport()
	t.Proxy = nil
	return t, nil
}

func (m *instanceSource) fetch(ctx context.Context) (session, error) {
	token, err := m.token(ctx)
	if err != nil && !m.allowV1 {
		return session{}, err
	}
	role := m.role
	if role == "" {
		list, err := m.get(ctx, "", token)
		if err != nil {
			return session{}, err
		}
		role, _, _ = strings.Cut(strings.TrimSpace(string(list)), "\n")
		if role = strings.TrimSpace(role); !roleNamePattern.MatchString(role) {
			return session{}, m.fault(kmsclient.BrokenContract, http.StatusOK, "what it names as the instance's role is no name of one")
		}
	}
	body, err := m.get(ctx, role, token)
	if err != nil {
		return session{}, err
	}
	var response struct {
		Code string
		sessionResponse
	}
	if err := json.Unmarshal(body, &response); err != nil {
		return session{}, m.fault(kmsclient.BrokenContract, http.StatusOK, "the answer is not JSON of the expected form")
	}
	if response.Code != "Success" {
		e := m.fault(kmsclient.Unreachable, http.StatusOK, "it does not give the role's credentials now")
		e.Code = safeCode(response.Code)
		return session{}, e
	}
	s, err := response.session("ecs_ram_role")
	if err != nil {
		return session{}, m.fault(kmsclient.BrokenContract, http.StatusOK, err.Error())
	}
	return s, nil
}

// token requests a token for version 2 of the metadata server.
func (m *instanceSource) token(ctx context.Context) (string, error) {
	status, body, err := m.do(ctx, http.MethodPut, "/latest/api/token", headerTTL, metadataTTL)
	token := strings.TrimSpace(string(body))
	switch {
	case err != nil:
		return "", err
	case status >= 500 || status == http.StatusTooManyRequests:
		return "", m.fault(kmsclient.Unreachable, status, "it gave no token")
	case status != http.StatusOK:
		return "", m.fault(kmsclient.Denied, status, "it gave no token: this is no ECS instance and something else answers, or one with the older protocol only, which "+metadataVersion)
	case token == "" || len(token) > maxTokenOfV2 || !isVisible(token):
		return "", m.fault(kmsclient.BrokenContract, status, "what it gave as a token is none")
	}
	return token, nil
}

// get requests the credentials of a role, or the role's name. Without a token it speaks version
// 1.
func (m *instanceSource) get(ctx context.Context, role, token string) ([]byte, error) {
	header := headerToken
	if token == "" {
		header = ""
	}
	status, body, err := m.do(ctx, http.MethodGet, metadataRoles+url.PathEscape(role), header, token)
	switch {
	case err != nil:
		return nil, err
	case status == http.StatusOK:
		return body, nil
	case status == http.StatusNotFound:
		detail := "the instance has no RAM role"
		if role != "" {
			detail += fmt.Sprintf(" %q", role)
		}
		if token == "" { // nothing has shown that it is one
			detail += ", or this is no ECS instance and something else answers"
		}
		return nil, m.fault(kmsclient.Denied, status, detail)
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return nil, m.fault(kmsclient.Denied, status, "it refuses to give the role's credentials")
	}
	return nil, m.fault(kmsclient.Unreachable, status, "it does not give the role's credentials now")
}

// do makes one request. It goes past http.Client, which follows redirects.
func (m *instanceSource) do(ctx context.Context, method, path, header, value string) (int, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, metadataTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, m.url+path, nil)
	if err != nil {
		return 0, nil, m.fault(kmsclient.Denied, 0, "its address is not a URL")
	}
	if header != "" {
		req.Header.Set(header, value)
	}
	req.Header.Set("User-Agent", userAgent)
	resp, err := m.pool.RoundTrip(req)
	if err != nil {
		return 0, nil, m.unreachable(ctx, method)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxMetadata+1))
	switch {
	case err != nil:
		return 0, nil, m.unreachable(ctx, method)
	case len(body) > maxMetadata:
		return 0, nil, m.fault(kmsclient.BrokenContract, resp.StatusCode, "the answer is larger than 64 KiB")
	}
	return resp.StatusCode, body, nil
}

func (m *instanceSource) unreachable(ctx context.Context, method string) error {
	detail := "it cannot be reached: this is no ECS instance, or its network keeps the address back"
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		detail = "it did not answer in time"
		if method == http.MethodPut {
			detail += ": in a container, the instance's limit of hops for metadata answers must be at least 2"
		}
	}
	return m.fault(kmsclient.Unreachable, 0, detail)
}

func (m *instanceSource) fault(reason kmsclient.Reason, status int, detail string) *kmsclient.Error {
	return &kmsclient.Error{
		Op: opOfMetadata, Reason: reason, HTTPStatus: status, Detail: "the metadata server at " + m.url + ": " + detail,
	}
}

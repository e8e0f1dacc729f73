package alibaba

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	sdkerrors "github.com/aliyun/alibaba-cloud-sdk-go/sdk/errors"
	"github.com/aliyun/alibaba-cloud-sdk-go/sdk/requests"
	"github.com/aliyun/alibaba-cloud-sdk-go/services/kms"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

const (
	stsVersion      = "2015-04-01"
	sessionDuration = time.Hour
	maxPolicy       = 2048 // characters, the vendor's limit
)

var (
	rolePattern        = regexp.MustCompile(`^acs:ram::[0-9]{1,20}:role/[A-Za-z0-9._-]{1,64}$`)
	oidcPattern        = regexp.MustCompile(`^acs:ram::[0-9]{1,20}:oidc-provider/[A-Za-z0-9._-]{1,128}$`)
	sessionNamePattern = regexp.MustCompile(`^[A-Za-z0-9.@_-]{2,64}$`)
)

// roleSource fetches sessions of a role from the vendor's Security Token Service (STS).
type roleSource struct {
	sts        remote
	base       *staticSource     // who assumes the role; nil for type oidc
	token      part              // of type oidc
	parameters map[string]string // of either operation; all but the token
}

func newRoleSource(c Credentials, region string, logger *slog.Logger) (*sessionSource, error) {
	var problems []error
	report := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }

	duration := cmp.Or(c.Duration, sessionDuration)
	endpoint, err := endpointOr(c.STSEndpoint, "sts."+region+".aliyuncs.com")
	if err != nil {
		err = fmt.Errorf("sts %w", err)
	}
	r := &roleSource{
		sts: remote{name: "STS", caField: "stsCAFile", region: region, endpoint: endpoint},
		parameters: map[string]string{
			"RoleArn":         cmp.Or(c.RoleARN, strings.TrimSpace(os.Getenv("ALIBABA_CLOUD_ROLE_ARN"))),
			"RoleSessionName": cmp.Or(c.SessionName, userAgent),
			"DurationSeconds": strconv.FormatInt(int64(duration/time.Second), 10),
		},
	}
	if c.Policy != "" {
		r.parameters["Policy"] = c.Policy
	}
	if !rolePattern.MatchString(r.parameters["RoleArn"]) {
		report("roleARN (or ALIBABA_CLOUD_ROLE_ARN) %q is not acs:ram::<account>:role/<name>", r.parameters["RoleArn"])
	}
	if !sessionNamePattern.MatchString(r.parameters["RoleSessionName"]) {
		report("sessionName %q is not 2 to 64 letters, digits, . @ _ and -", c.SessionName)
	}
	if duration < 15*time.Minute || duration > 12*time.Hour || duration%time.Second != 0 {
		report("duration %v is not whole seconds from 15m to 12h", duration)
	}
	if len(c.Policy) > maxPolicy || c.Policy != "" && !json.Valid([]byte(c.Policy)) {
		report("policy is not JSON of at most %d characters", maxPolicy)
	}
	problems = append(problems, err)
	fetch := r.assume
	if c.Type == OIDC {
		fetch = r.assumeWithToken
		err = r.oidc(c)
	} else {
		err = r.assumedBy(c, logger)
	}
	problems = append(problems, err)
	if r.sts.pool, err = newPool(c.STSCAFile, logger); err != nil {
		report("sts %w", err)
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	source := newSessionSource(logger, fetch, r.files, r.sts.pool.CloseIdleConnections)
	source.problem = r.sts.pool.problem
	return source, nil
}

// assumedBy sets what only type assumeRole has.
func (r *roleSource) assumedBy(c Credentials, logger *slog.Logger) (err error) {
	if c.ExternalID != "" {
		r.parameters["ExternalId"] = c.ExternalID
	}
	if base := cmp.Or(c.Base, AccessKey); base != AccessKey && base != STS {
		return fmt.Errorf("base %q is neither accessKey nor sts", c.Base)
	}
	r.base, err = newStaticSource(c, c.Base == STS, logger)
	return err
}

// oidc sets what only type oidc has.
func (r *roleSource) oidc(c Credentials) error {
	provider := cmp.Or(c.OIDCProviderARN, strings.TrimSpace(os.Getenv("ALIBABA_CLOUD_OIDC_PROVIDER_ARN")))
	r.parameters["OIDCProviderArn"] = provider
	r.token = part{name: "OIDC token", file: cmp.Or(c.OIDCTokenFile, strings.TrimSpace(os.Getenv("ALIBABA_CLOUD_OIDC_TOKEN_FILE")))}
	if !oidcPattern.MatchString(provider) {
		return fmt.Errorf("oidcProviderARN (or ALIBABA_CLOUD_OIDC_PROVIDER_ARN) %q is not acs:ram::<account>:oidc-provider/<name>", provider)
	}
	if r.token.file == "" {
		return problem.New("name oidcTokenFile, or set ALIBABA_CLOUD_OIDC_TOKEN_FILE", "no OIDC token")
	}
	_, err := r.token.read()
	return err
}

func (r *roleSource) files() []string {
	if r.base == nil {
		return []string{r.token.file}
	}
	return r.base.files()
}

// assume calls AssumeRole, signed with the base credentials.
func (r *roleSource) assume(ctx context.Context) (session, error) {
	const op = "AssumeRole"
	var body []byte
	call := func(c *kms.Client) error {
		req := requests.NewCommonRequest()
		req.Product, req.Version, req.ApiName, req.Method = "Sts", stsVersion, op, requests.POST
		maps.Copy(req.FormParams, r.parameters)
		resp, err := c.ProcessCommonRequest(req)
		if err == nil {
			body = resp.GetHttpContentBytes()
		}
		return err
	}
	cred, err := r.base.get(ctx)
	if err != nil {
		return session{}, r.denied(op, err)
	}
	if f := r.sts.callSigned(ctx, op, r.base, cred, call); f != nil {
		return session{}, r.explained(ctx, f)
	}
	return r.session(op, "ram_role_arn", body)
}

// assumeWithToken calls AssumeRoleWithOIDC, which is not signed. The token travels in the body, not
// in the URL.
func (r *roleSource) assumeWithToken(ctx context.Context) (session, error) {
	const op = "AssumeRoleWithOIDC"
	token, err := r.token.read()
	if err != nil {
		return session{}, r.denied(op, err)
	}
	form := url.Values{"OIDCToken": {token}}
	for name, value := range r.parameters {
		form.Set(name, value)
	}
	var body []byte
	f := r.sts.retryStale(ctx, op, credential{token: token}, func(t *callTransport) (err error) {
		body, err = r.post(t, url.Values{
			"Action": {op}, "Version": {stsVersion}, "Format": {"JSON"}, "Timestamp": {time.Now().UTC().Format("2006-01-02T15:04:05Z")},
		}, form)
		return err
	})
	if f != nil {
		return session{}, r.explained(ctx, f)
	}
	return r.session(op, "oidc_role_arn", body)
}

// post sends a form. It goes past http.Client, which follows redirects and quotes URLs in its
// errors.
func (r *roleSource) post(t *callTransport, query, form url.Values) ([]byte, error) {
	req, err := http.NewRequestWithContext(t.ctx, http.MethodPost, "https://"+r.sts.endpoint+"/?"+query.Encode(), strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("User-Agent", userAgent)
	resp, err := t.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = sdkerrors.NewServerError(resp.StatusCode, string(body), "")
	}
	return body, err
}

// session reads the answer of either operation.
func (r *roleSource) session(op, source string, body []byte) (session, error) {
	var response struct {
		RequestID   string `json:"RequestId"`
		Credentials sessionResponse
	}
	if err := json.Unmarshal(body, &response); err != nil {
		detail := r.at(op) + "the answer is not JSON of the expected form: something other than STS may have given it"
		return session{}, &kmsclient.Error{Op: op, Reason: kmsclient.Unreachable, HTTPStatus: http.StatusOK, Detail: detail}
	}
	s, err := response.Credentials.session(source)
	if err != nil {
		return session{}, contractError(op, response.RequestID, "", r.at(op)+err.Error())
	}
	return s, nil
}

func (r *roleSource) at(op string) string { return op + " at " + r.sts.endpoint + ": " }

// denied is the error for what a file lacks.
func (r *roleSource) denied(op string, err error) error {
	return &kmsclient.Error{Op: op, Reason: kmsclient.Denied, Detail: r.at(op) + err.Error()}
}

// explained turns a failure of STS into one that says what it means for the caller of the KMS:
// whatever STS refuses, an operator has to act.
func (r *roleSource) explained(ctx context.Context, f *failure) error {
	e := f.err
	if c := e.Class(); c == kmsclient.ClassInvalid || c == kmsclient.ClassKeyUnusable || c == kmsclient.ClassContract && e.Code != "" {
		e.Reason = kmsclient.Denied
	}
	switch family, rest, _ := strings.Cut(e.Code, "."); {
	case family == "NoPermission":
		e.Detail = "the role may not be assumed: see the role's trust policy, and whether the caller has sts:AssumeRole on it" + f.message
	case family == "EntityNotExist" && strings.HasPrefix(rest, "Role"):
		e.Detail = "there is no such role" + f.message
	case family == "EntityNotExist":
		e.Detail = "there is no such OIDC provider" + f.message
	case family == "AuthenticationFail":
		e.Detail = "the OIDC token was refused: it may have expired, or be of another issuer or for another audience" + f.message
	case family == "InvalidParameter":
		e.Detail = "STS does not accept a parameter: see duration, sessionName and policy" + f.message
	case e.Code == "" && errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.Detail = "STS did not answer in time"
	case e.Detail == "" && e.Class() == kmsclient.ClassUnavailable:
		e.Detail = "STS throttles the call or fails"
	case e.Detail == "":
		e.Detail = "STS refuses it"
	}
	e.Detail = r.at(e.Op) + e.Detail
	return e
}

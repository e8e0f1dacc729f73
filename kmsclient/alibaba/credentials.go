package alibaba

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/aliyun/alibaba-cloud-sdk-go/sdk/auth/credentials"
)

// The types of [Credentials].
const (
	AccessKey = "accessKey" // the id and secret of an access key
	STS       = "sts"       // the same with the security token of a session
)

// supportedTypes are the types that New takes, knownTypes those that the configuration may name.
var (
	supportedTypes = []string{AccessKey, STS}
	knownTypes     = []string{AccessKey, STS, "ecsRAMRole", "oidc", "assumeRole"}
)

// maxCredentialFile limits the bytes of a credential file; security tokens have about one KiB.
const maxCredentialFile = 16 << 10

// Credentials say where the caller's credentials come from. Each part that has no file comes from the environment:
// ALIBABA_CLOUD_ACCESS_KEY_ID, ALIBABA_CLOUD_ACCESS_KEY_SECRET and, for type sts, ALIBABA_CLOUD_SECURITY_TOKEN.
//
// Files are read anew for each call, so a replaced file counts at once. While one cannot be read, the last good credentials are used.
type Credentials struct {
	// Type is "accessKey" (the default) or "sts".
	Type string
	// AccessKeyIDFile, AccessKeySecretFile and SecurityTokenFile hold one value each; white space around it is ignored.
	AccessKeyIDFile, AccessKeySecretFile, SecurityTokenFile string
}

// credential is what one request is signed with. It is comparable. It never prints itself.
type credential struct {
	id, secret, token string
	source            string // "static_ak" or "static_sts": the name that the SDK sends along
}

// String implements [fmt.Stringer].
func (credential) String() string { return "[redacted]" }

// GoString implements [fmt.GoStringer].
func (credential) GoString() string { return "[redacted]" }

// Format implements [fmt.Formatter], so that no verb prints the fields.
func (credential) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, "[redacted]") }

// LogValue implements [slog.LogValuer].
func (credential) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// scrub returns text unless it quotes a part of the credential. Real parts have at least 16 characters; one of a few letters, as a
// test may have, would be found in most words.
func (c credential) scrub(text string) string {
	for _, secret := range []string{c.id, c.secret, c.token} {
		if len(secret) >= 8 && strings.Contains(text, secret) {
			return ""
		}
	}
	return text
}

// provider hands the credential to the SDK.
func (c credential) provider() credentials.CredentialsProvider { return provider{c} }

// provider is the SDK's view of one credential. The SDK's own providers are not used: they have no locks, refresh on the request
// path, and its default chain, used when there is none, can stick to the wrong one.
type provider struct{ c credential }

func (p provider) GetProviderName() string { return p.c.source }

func (p provider) GetCredentials() (*credentials.Credentials, error) {
	return &credentials.Credentials{
		AccessKeyId: p.c.id, AccessKeySecret: p.c.secret, SecurityToken: p.c.token, ProviderName: p.c.source,
	}, nil
}

// credentialSource gives the credentials of a call. It is safe for concurrent use, and its errors hold no secret.
type credentialSource interface {
	// get returns the credentials to use now.
	get(ctx context.Context) (credential, error)
	// renew returns the credentials to use after the KMS rejected some. The same again mean that there are no others.
	renew(ctx context.Context, rejected credential) (credential, error)
}

// newCredentialSource returns the source that c describes, after it has given credentials once.
func newCredentialSource(c Credentials, logger *slog.Logger) (credentialSource, error) {
	kind := cmp.Or(c.Type, AccessKey)
	supported := strings.Join(supportedTypes, ", ")
	switch {
	case !slices.Contains(knownTypes, kind):
		return nil, fmt.Errorf("credentials: unknown type %q; supported types: %s", kind, supported)
	case !slices.Contains(supportedTypes, kind):
		return nil, fmt.Errorf("credentials: type %q is not supported in this version; supported types: %s", kind, supported)
	case kind != STS && c.SecurityTokenFile != "":
		return nil, fmt.Errorf("credentials: securityTokenFile belongs to type %q, not %q", STS, kind)
	}
	s := &staticSource{
		logger: logger, source: "static_ak",
		id:     part{name: "access key ID", file: c.AccessKeyIDFile, variable: "ALIBABA_CLOUD_ACCESS_KEY_ID"},
		secret: part{name: "access key secret", file: c.AccessKeySecretFile, variable: "ALIBABA_CLOUD_ACCESS_KEY_SECRET"},
	}
	if kind == STS {
		s.source = "static_sts"
		s.token = &part{name: "security token", file: c.SecurityTokenFile, variable: "ALIBABA_CLOUD_SECURITY_TOKEN"}
	}
	first, err := s.read()
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	s.last = first
	return s, nil
}

// staticSource reads credentials that others put into files or the environment.
type staticSource struct {
	logger     *slog.Logger
	source     string
	id, secret part
	token      *part // nil for an access key

	mu      sync.Mutex
	last    credential // the last that was complete
	failing bool       // the last read failed, and was reported
}

func (s *staticSource) get(ctx context.Context) (credential, error) {
	c, err := s.read()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if !s.failing {
			s.logger.WarnContext(ctx, "alibaba credentials cannot be read, the last good ones stay in use", "error", err)
		}
		s.failing = true
		return s.last, nil
	}
	s.last, s.failing = c, false
	return c, nil
}

func (s *staticSource) renew(ctx context.Context, _ credential) (credential, error) {
	return s.get(ctx)
}

// read returns the credentials as they stand now, or every problem with them.
func (s *staticSource) read() (credential, error) {
	c := credential{source: s.source}
	var idErr, secretErr, tokenErr error
	c.id, idErr = s.id.read()
	c.secret, secretErr = s.secret.read()
	if s.token != nil {
		c.token, tokenErr = s.token.read()
	}
	if err := errors.Join(idErr, secretErr, tokenErr); err != nil {
		return credential{}, err
	}
	return c, nil
}

// part is one value of a credential.
type part struct{ name, file, variable string }

func (p part) read() (string, error) {
	if p.file == "" {
		value := strings.TrimSpace(os.Getenv(p.variable))
		if value == "" {
			return "", fmt.Errorf("no %s: name a file, or set %s", p.name, p.variable)
		}
		return p.check(value, "$"+p.variable)
	}
	f, err := os.Open(p.file)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", p.name, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxCredentialFile+1))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", p.name, err)
	}
	if len(text) > maxCredentialFile {
		return "", fmt.Errorf("read %s: %s is larger than 16 KiB", p.name, p.file)
	}
	return p.check(strings.TrimSpace(string(text)), p.file)
}

// check refuses what cannot be a credential, without quoting it.
func (p part) check(value, from string) (string, error) {
	if value == "" {
		return "", fmt.Errorf("%s: %s is empty", p.name, from)
	}
	if strings.IndexFunc(value, func(r rune) bool { return r <= ' ' || r > '~' }) >= 0 {
		return "", fmt.Errorf("%s: %s holds white space or other characters that a credential cannot have", p.name, from)
	}
	return value, nil
}

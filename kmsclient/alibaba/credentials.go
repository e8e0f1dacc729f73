package alibaba

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/aliyun/alibaba-cloud-sdk-go/sdk/auth/credentials"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// The types of [Credentials].
const (
	AccessKey  = "accessKey"  // the id and secret of an access key
	STS        = "sts"        // the same with the security token of a session
	ECSRAMRole = "ecsRAMRole" // the role of the ECS instance, from its metadata server
	// OIDC: a role that is assumed with a token of an OpenID Connect provider (in ACK: RRSA)
	OIDC       = "oidc"
	AssumeRole = "assumeRole" // a role that is assumed with an access key or a session
)

// Credentials say where the caller's credentials come from. Only the type that is named is tried.
//
// Those of type accessKey and sts are read for each call, so a replaced file takes effect at once.
// While one cannot be read, the last good credentials are used. The other types give sessions that
// end: a new one is fetched in the background when a sixth of its life, or five minutes, are left,
// by one fetch at a time; while that fails, the old one is used until it ends.
type Credentials struct {
	// Type is one of the constants; "" is accessKey.
	Type string
	// AccessKeyIDFile, AccessKeySecretFile and SecurityTokenFile hold one value each; white space
	// around it is ignored. Each part that has no file comes from the environment:
	// ALIBABA_CLOUD_ACCESS_KEY_ID, ALIBABA_CLOUD_ACCESS_KEY_SECRET and
	// ALIBABA_CLOUD_SECURITY_TOKEN. For the types accessKey, sts and assumeRole.
	AccessKeyIDFile, AccessKeySecretFile, SecurityTokenFile string
	// Base is what type assumeRole assumes the role with: accessKey (the default) or sts.
	Base string
	// RoleARN is the role ("acs:ram::<account>:role/<name>") of the types assumeRole and oidc; by
	// default ALIBABA_CLOUD_ROLE_ARN.
	RoleARN string
	// OIDCProviderARN and OIDCTokenFile belong to type oidc; by default
	// ALIBABA_CLOUD_OIDC_PROVIDER_ARN and ALIBABA_CLOUD_OIDC_TOKEN_FILE. The file is read for
	// each session.
	OIDCProviderARN, OIDCTokenFile string
	// ExternalID is for type assumeRole, if the role's trust policy requires it.
	ExternalID string
	// SessionName is how the KMS' audit log calls the session of a role; by default
	// "etcd-kms-proxy".
	SessionName string
	// Policy is a RAM policy that restricts the session of a role further; by default none does.
	Policy string
	// Duration is the life of the session of a role: 15 minutes up to what the role allows; by
	// default an hour.
	Duration time.Duration
	// STSEndpoint is "host" or "host:port" of the service that gives sessions of roles, always over
	// HTTPS; by default the region's, sts.<region>.aliyuncs.com. STSCAFile holds PEM certificates
	// to verify it with, in place of the system's.
	STSEndpoint, STSCAFile string
	// RoleName is the instance's role for type ecsRAMRole; by default it is requested from the
	// metadata server.
	RoleName string
	// AllowMetadataV1 requests credentials without a token if the metadata server issues none.
	// Anyone who can make a process on the instance fetch a URL can then steal the credentials.
	AllowMetadataV1 bool
	// MetadataURL and MetadataCAFile name another metadata server. For tests.
	MetadataURL, MetadataCAFile string
}

// credential is what one request is signed with. It is comparable. It never prints itself.
type credential struct {
	id, secret, token string
	source            string // "static_ak", "static_sts" …: the name that the SDK sends along
}

// String implements [fmt.Stringer].
func (credential) String() string { return "[redacted]" }

// GoString implements [fmt.GoStringer].
func (credential) GoString() string { return "[redacted]" }

// Format implements [fmt.Formatter], so that no verb prints the fields.
func (credential) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, "[redacted]") }

// LogValue implements [slog.LogValuer].
func (credential) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// scrub returns text unless it quotes a part of the credential. Real parts have at least 16
// characters; one of a few letters, as a test may have, would be found in most words.
func (c credential) scrub(text string) string {
	for _, secret := range []string{c.id, c.secret, c.token} {
		if len(secret) >= 8 && strings.Contains(text, secret) {
			return ""
		}
	}
	return text
}

// provider is the SDK's view of one credential. The SDK's own providers are not used: they have no
// locks, refresh on the request path, and its default chain, used when there is none, can stick to
// the wrong one.
type provider struct{ c credential }

func (p provider) GetProviderName() string { return p.c.source }

func (p provider) GetCredentials() (*credentials.Credentials, error) {
	return &credentials.Credentials{
		AccessKeyId: p.c.id, AccessKeySecret: p.c.secret, SecurityToken: p.c.token, ProviderName: p.c.source,
	}, nil
}

// credentialSource gives the credentials of a call. It is safe for concurrent use, and its errors
// hold no secret: they are an *kmsclient.Error, or the context's.
type credentialSource interface {
	// get returns the credentials to use now.
	get(ctx context.Context) (credential, error)
	// renew returns the credentials to use after the KMS rejected some. The same again mean that
	// there are no others.
	renew(ctx context.Context, rejected credential) (credential, error)
	// expires returns when the credentials of the last get end; zero if they do not, or if there
	// are none yet.
	expires() time.Time
	// late reports whether credentials that end should have been followed by others.
	late() bool
	// close ends current requests and waits for them. The source gives no credentials afterwards.
	close()
}

// newCredentialSource returns the source that c describes. It reads the files and variables that c
// names, and connects to nothing.
func newCredentialSource(c Credentials, region string, logger *slog.Logger) (credentialSource, error) {
	source, err := chooseSource(c, region, logger)
	if err != nil {
		return nil, problem.In("credentials", "", err)
	}
	return source, nil
}

func chooseSource(c Credentials, region string, logger *slog.Logger) (credentialSource, error) {
	if c.SecurityTokenFile != "" && c.Type != STS && (c.Type != AssumeRole || c.Base != STS) {
		return nil, fmt.Errorf("securityTokenFile belongs to type %q", STS)
	}
	switch c.Type {
	case "", AccessKey, STS:
		return newStaticSource(c, c.Type == STS, logger)
	case AssumeRole, OIDC:
		return newRoleSource(c, region, logger)
	case ECSRAMRole:
		return newInstanceSource(c, logger)
	}
	known := strings.Join([]string{AccessKey, STS, ECSRAMRole, OIDC, AssumeRole}, ", ")
	return nil, fmt.Errorf("unknown type %q; known types: %s", c.Type, known)
}

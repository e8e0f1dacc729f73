// Package alibaba is the backend for Alibaba Cloud KMS. It calls the KMS through the vendor's SDK
// (github.com/aliyun/alibaba-cloud-sdk-go, product Kms, version 2016-01-20). Nothing outside this
// folder uses that SDK, so that a newer one can replace it here.
//
// The package makes up for what the SDK does not do:
//   - kms.Client is not safe for concurrent use: each call makes its own, over one shared
//     connection pool ([transport]).
//   - The SDK knows no context, follows redirects, reads responses without a limit and defaults to
//     plain HTTP: the transport passes on the caller's context, refuses redirects and anything but
//     HTTPS to the configured host, and limits responses to 1 MiB.
//   - The SDK's errors quote the request's URL, which holds the security token and the signature.
//     None of them leaves this package: [failure] keeps what is safe (operation, code, HTTP status,
//     request ID) and drops the text.
//   - The SDK panics on some responses and accepts empty ones: panics are recovered, and each field
//     is checked.
//
// The package neither retries nor limits the rate of calls; the wrapper of package kmsclient does.
// It makes two exceptions, each at most once per call, because only this package can detect them: a
// connection that the KMS closed while it was idle, and credentials that were replaced in the
// meantime.
package alibaba

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aliyun/alibaba-cloud-sdk-go/sdk/requests"
	"github.com/aliyun/alibaba-cloud-sdk-go/services/kms"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

const (
	dataKeySize   = 32       // bytes of a seed
	maxPlaintext  = 6 << 10  // bytes that Encrypt takes, the vendor's limit
	maxCiphertext = 16 << 10 // characters of a CiphertextBlob: maxPlaintext in base64, with room
	// maxWrappedSeed: characters of a data key's CiphertextBlob: the stored value's own limit
	maxWrappedSeed = 1 << 10
	maxContext     = 8192 // characters of an EncryptionContext, the vendor's limit
	apiVersion     = "2016-01-20"
	userAgent      = "etcd-kms-proxy"
)

// Config describes one key of Alibaba Cloud KMS.
type Config struct {
	// Region is the key's region, e.g. "cn-hangzhou". Required.
	Region string
	// KeyID is the key's id ("key-…"), an alias ("alias/…") or an ARN ("acs:kms:…"). Required.
	// Stored values always name the real id that the KMS answers, so an alias may be moved to
	// another key, which then counts as a rotation.
	KeyID string
	// Endpoint is "host" or "host:port" of the KMS, always spoken to over HTTPS. The default is the
	// public endpoint of the region, kms.<region>.aliyuncs.com; kms-vpc.<region>.aliyuncs.com is
	// the one within a VPC, and a dedicated instance has its own.
	Endpoint string
	// CAFile holds PEM certificates that the endpoint's certificate is verified against, in place
	// of the system's. A dedicated instance needs its private CA here. It is read once, by New.
	CAFile string
	// EncryptionContext is bound to everything that is wrapped, and is needed again to unwrap it:
	// changing it makes existing values unreadable. At most 8,192 characters as JSON.
	EncryptionContext map[string]string
	// Credentials say who calls. The zero value takes an access key from the environment.
	Credentials Credentials
	// Logger logs that credentials cannot be read or refreshed, and that the last good ones are
	// kept. The default discards.
	Logger *slog.Logger
}

// Backend is a client of one key. It is safe for concurrent use. Where its credentials are
// sessions, a call may start a goroutine that fetches the next; that, and idle connections, last
// until [Backend.Close] at the latest.
type Backend struct {
	remote                   // the KMS; its keyID is as configured: id, alias or ARN
	realID            string // the id that answers must name; "" if keyID is an alias
	encryptionContext string // JSON, or ""
	creds             credentialSource
}

var (
	_ kmsclient.Service          = (*Backend)(nil)
	_ kmsclient.DataKeyGenerator = (*Backend)(nil)
	_ kmsclient.Describer        = (*Backend)(nil)
	_ kmsclient.KeyIDParser      = (*Backend)(nil)
	_ kmsclient.SessionHolder    = (*Backend)(nil)
	_ kmsclient.FileChecker      = (*Backend)(nil)
)

// warmEndpointMap makes the SDK fill its lazy global map, which it does without a lock, before
// there is concurrency.
var warmEndpointMap = sync.OnceFunc(func() { kms.GetEndpointMap() })

var (
	regionPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	keyIDPattern  = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)
	configPattern = regexp.MustCompile(`^[A-Za-z0-9_:/.@*+=-]{1,255}$`)
)

// New checks the configuration and returns a backend. It reads the CA and credential files but
// opens no connection. The error names every problem that was found.
func New(cfg Config) (*Backend, error) {
	problems := checkEnvironment()
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }

	if !regionPattern.MatchString(cfg.Region) {
		problem(`region %q is not a region ID such as "cn-hangzhou"`, cfg.Region)
	}
	if !configPattern.MatchString(cfg.KeyID) {
		problem(`keyID %q is not a key ID, an alias ("alias/…") or an ARN ("acs:kms:…")`, cfg.KeyID)
	}
	endpoint, endpointErr := endpointOr(cfg.Endpoint, "kms."+cfg.Region+".aliyuncs.com")
	encryptionContext, contextErr := marshalContext(cfg.EncryptionContext)
	logger := cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler))
	creds, credsErr := newCredentialSource(cfg.Credentials, cfg.Region, logger)
	pool, poolErr := newPool(cfg.CAFile, logger)
	problems = append(problems, checkARN(cfg.KeyID, cfg.Region), endpointErr, contextErr, credsErr, poolErr)
	if err := errors.Join(problems...); err != nil {
		if creds != nil {
			creds.close()
		}
		return nil, err
	}
	warmEndpointMap()
	return &Backend{
		remote: remote{name: "the KMS", caField: "caFile", region: cfg.Region, endpoint: endpoint, keyID: cfg.KeyID, pool: pool, hidden: slices.Collect(maps.Values(cfg.EncryptionContext))},
		realID: realID(cfg.KeyID), encryptionContext: encryptionContext, creds: creds,
	}, nil
}

// CredentialsExpire returns when the session ends that calls are signed with. It is zero for
// credentials that do not say (an access key, a token from a file), and before the first call. It
// comes near only if no new session can be fetched.
func (b *Backend) CredentialsExpire() time.Time { return b.creds.expires() }

// CredentialsLate reports whether the next session is not there when it should be: the last fetch
// has failed, or half of the time between the refresh and the end has gone by. Near its end alone,
// a session is not late: one of 15 minutes is renewed when 5 are left.
func (b *Backend) CredentialsLate() bool { return b.creds.late() }

// CheckFiles checks caFile and stsCAFile, which are read again when they change, and returns why
// the newest ones are not in use, or nil if they are. It is called every few seconds, so that a bad
// file is reported before a connection needs it.
func (b *Backend) CheckFiles() error {
	problems := []error{b.pool.problem()}
	if s, ok := b.creds.(*sessionSource); ok && s.problem != nil {
		problems = append(problems, s.problem())
	}
	return errors.Join(problems...)
}

// Close ends the fetching of credentials and closes idle connections. It always returns nil. Calls
// must have ended.
func (b *Backend) Close() error {
	b.creds.close()
	b.pool.CloseIdleConnections()
	return nil
}

// GenerateDataKey has the KMS make a seed; only its wrapped form and, over TLS, the seed itself
// travel.
func (b *Backend) GenerateDataKey(ctx context.Context, _ string) (*kmsclient.DataKey, error) {
	const op = "GenerateDataKey"
	resp, err := call(ctx, b, op, func(c *kms.Client) (*kms.GenerateDataKeyResponse, error) {
		req := kms.CreateGenerateDataKeyRequest()
		req.KeyId, req.KeySpec, req.EncryptionContext = b.keyID, "AES_256", b.encryptionContext
		return c.GenerateDataKey(req)
	})
	if err != nil {
		return nil, err
	}
	kmsclient.NoteRequestID(ctx, safeRequestID(resp.RequestId))
	keyID, err := b.wrappedBy(op, resp.RequestId, resp.KeyId, resp.KeyVersionId, resp.CiphertextBlob, maxWrappedSeed)
	if err != nil {
		return nil, err
	}
	seed, err := base64.StdEncoding.DecodeString(resp.Plaintext)
	if err != nil || len(seed) != dataKeySize {
		return nil, contractError(op, resp.RequestId, keyID, "the answer's Plaintext is not 32 bytes in base64")
	}
	return &kmsclient.DataKey{Plaintext: seed, Ciphertext: []byte(resp.CiphertextBlob), KeyID: keyID}, nil
}

// Encrypt wraps 1 to 6,144 bytes. The plaintext travels in the request's body, not in its URL, so
// that no proxy or log on the way can keep it as part of an address.
func (b *Backend) Encrypt(ctx context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	const op = "Encrypt"
	if len(data) == 0 || len(data) > maxPlaintext {
		return nil, &kmsclient.Error{Op: op, Reason: kmsclient.Invalid, KeyID: b.keyID, Detail: "the plaintext is not 1 to 6144 bytes long"}
	}
	resp, err := call(ctx, b, op, func(c *kms.Client) (*kms.EncryptResponse, error) {
		req := requests.NewCommonRequest()
		req.Product, req.Version, req.ApiName, req.Method = "Kms", apiVersion, op, requests.POST
		req.FormParams["KeyId"] = b.keyID
		req.FormParams["Plaintext"] = base64.StdEncoding.EncodeToString(data)
		if b.encryptionContext != "" {
			req.FormParams["EncryptionContext"] = b.encryptionContext
		}
		req.TransToAcsRequest()
		resp := kms.CreateEncryptResponse()
		return resp, c.DoAction(req, resp)
	})
	if err != nil {
		return nil, err
	}
	kmsclient.NoteRequestID(ctx, safeRequestID(resp.RequestId))
	keyID, err := b.wrappedBy(op, resp.RequestId, resp.KeyId, resp.KeyVersionId, resp.CiphertextBlob, maxCiphertext)
	if err != nil {
		return nil, err
	}
	return &service.EncryptResponse{Ciphertext: []byte(resp.CiphertextBlob), KeyID: keyID}, nil
}

// Decrypt unwraps what Encrypt or GenerateDataKey wrapped, under any version of any key that the
// caller may use: the request names no key, so the key and version in the answer are compared with
// req.KeyID.
func (b *Backend) Decrypt(ctx context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	const op = "Decrypt"
	id, version, ok := strings.Cut(req.KeyID, "/")
	if !ok || !keyIDPattern.MatchString(id) || !keyIDPattern.MatchString(version) {
		return nil, &kmsclient.Error{Op: op, Reason: kmsclient.Invalid, Detail: "the key ID is not <key id>/<key version id>"}
	}
	if !isBlob(string(req.Ciphertext), maxCiphertext) {
		return nil, &kmsclient.Error{Op: op, Reason: kmsclient.Invalid, KeyID: req.KeyID, Detail: "the ciphertext is empty, too long or not text"}
	}
	resp, err := call(ctx, b, op, func(c *kms.Client) (*kms.DecryptResponse, error) {
		r := kms.CreateDecryptRequest()
		r.CiphertextBlob, r.EncryptionContext = string(req.Ciphertext), b.encryptionContext
		return c.Decrypt(r)
	})
	if err != nil {
		if e, ok := errors.AsType[*kmsclient.Error](err); ok {
			// the key that matters here is the one of the value, not the one configured
			e.KeyID = req.KeyID
		}
		return nil, err
	}
	kmsclient.NoteRequestID(ctx, safeRequestID(resp.RequestId))
	if resp.KeyId != id || resp.KeyVersionId != version {
		return nil, contractError(op, resp.RequestId, req.KeyID, "the answer names another key or version, or none")
	}
	plaintext, err := base64.StdEncoding.DecodeString(resp.Plaintext)
	if err != nil || len(plaintext) == 0 || len(plaintext) > maxPlaintext {
		return nil, contractError(op, resp.RequestId, req.KeyID, "the answer's Plaintext is not 1 to 6144 bytes in base64")
	}
	return plaintext, nil
}

// reportedKey checks the key that a response names and returns it as stored values spell it.
func (b *Backend) reportedKey(op, requestID, id, version string) (string, error) {
	if !keyIDPattern.MatchString(id) || !keyIDPattern.MatchString(version) {
		return "", contractError(op, requestID, b.keyID, "the answer names no key ID or no key version")
	}
	if b.realID != "" && id != b.realID {
		return "", contractError(op, requestID, b.keyID, "the answer names another key")
	}
	return id + "/" + version, nil
}

// wrappedBy checks the key and the ciphertext of a response, and returns what reportedKey does.
func (b *Backend) wrappedBy(op, requestID, id, version, ciphertext string, limit int) (string, error) {
	keyID, err := b.reportedKey(op, requestID, id, version)
	if err == nil && !isBlob(ciphertext, limit) {
		return "", contractError(op, requestID, keyID, "the answer's CiphertextBlob is empty, too long or not text")
	}
	return keyID, err
}

// KeyOf returns the id of the key in a key ID of stored values, <key id>/<key version id>, or in a
// configured one that holds it. All versions of a key are disabled and deleted as one.
func (*Backend) KeyOf(keyID string) string {
	if strings.HasPrefix(keyID, "acs:kms:") {
		return realID(keyID)
	}
	id, _, _ := strings.Cut(keyID, "/")
	return id
}

// isBlob reports whether s can be a CiphertextBlob: 1 to limit printable ASCII characters.
func isBlob(s string, limit int) bool {
	return len(s) > 0 && len(s) <= limit && isVisible(s)
}

package alibaba

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// maxCredentialFile limits the bytes of a credential file. Security tokens have about one KiB,
// tokens of OpenID Connect at most 20,000 bytes.
const maxCredentialFile = 32 << 10

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

// newStaticSource returns a source that has given credentials once.
func newStaticSource(c Credentials, withToken bool, logger *slog.Logger) (*staticSource, error) {
	s := &staticSource{
		logger: logger, source: "static_ak",
		id:     part{name: "access key ID", file: c.AccessKeyIDFile, variable: "ALIBABA_CLOUD_ACCESS_KEY_ID"},
		secret: part{name: "access key secret", file: c.AccessKeySecretFile, variable: "ALIBABA_CLOUD_ACCESS_KEY_SECRET"},
	}
	if withToken {
		s.source = "static_sts"
		s.token = &part{name: "security token", file: c.SecurityTokenFile, variable: "ALIBABA_CLOUD_SECURITY_TOKEN"}
	}
	first, err := s.read()
	if err != nil {
		return nil, err
	}
	s.last = first
	return s, nil
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
	if s.failing {
		s.logger.InfoContext(ctx, "alibaba credentials can be read again")
	}
	s.last, s.failing = c, false
	return c, nil
}

func (s *staticSource) renew(ctx context.Context, _ credential) (credential, error) {
	return s.get(ctx)
}

func (s *staticSource) expires() time.Time { return time.Time{} }
func (s *staticSource) late() bool         { return false }
func (s *staticSource) close()             {}

// read returns the current credentials, or all problems with them.
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

// files returns the names of the files that are read.
func (s *staticSource) files() []string {
	files := []string{s.id.file, s.secret.file}
	if s.token != nil {
		files = append(files, s.token.file)
	}
	return files
}

// part is one value of a credential.
type part struct{ name, file, variable string }

func (p part) read() (string, error) {
	if p.file == "" {
		value := strings.TrimSpace(os.Getenv(p.variable))
		if value == "" {
			return "", problem.New("name a file, or set "+p.variable, "no %s", p.name)
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
		return "", fmt.Errorf("read %s: %s is larger than %d KiB", p.name, p.file, maxCredentialFile>>10)
	}
	return p.check(strings.TrimSpace(string(text)), p.file)
}

// check refuses what cannot be a credential, without quoting it.
func (p part) check(value, from string) (string, error) {
	if value == "" {
		return "", fmt.Errorf("%s: %s is empty", p.name, from)
	}
	if !isVisible(value) {
		return "", fmt.Errorf("%s: %s holds white space or other characters that a credential cannot have", p.name, from)
	}
	return value, nil
}

// isVisible reports whether s is nothing but visible characters of ASCII.
func isVisible(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}

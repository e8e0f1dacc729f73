package alibaba

import (
	"crypto/fips140"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"unicode/utf8"
)

// realID returns the key ID of a configured key, or "" if only the KMS can resolve it.
func realID(keyID string) string {
	if rest, ok := strings.CutPrefix(keyID, "acs:kms:"); ok {
		_, id, _ := strings.Cut(rest, ":key/")
		return id
	}
	if strings.HasPrefix(keyID, "alias/") {
		return ""
	}
	return keyID
}

// marshalContext returns the context as JSON with sorted keys, so that equal contexts are equal
// bytes, or "" if there is none.
func marshalContext(m map[string]string) (string, error) {
	if len(m) == 0 {
		return "", nil
	}
	for k, v := range m {
		if k == "" || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return "", fmt.Errorf("encryptionContext: key %q is empty, or it or its value is not UTF-8", k)
		}
	}
	text, err := json.Marshal(m)
	if err != nil {
		return "", fmt.Errorf("encode encryptionContext: %w", err)
	}
	if n := utf8.RuneCount(text); n > maxContext {
		return "", fmt.Errorf("encryptionContext has %d characters as JSON; the KMS takes at most %d", n, maxContext)
	}
	return string(text), nil
}

// checkARN refuses an ARN of another region than the one that is called, which could only answer
// that it knows no such key.
func checkARN(keyID, region string) error {
	rest, ok := strings.CutPrefix(keyID, "acs:kms:")
	if !ok {
		return nil
	}
	switch parts := strings.SplitN(rest, ":", 3); {
	case len(parts) != 3 || !strings.HasPrefix(parts[2], "key/") && !strings.HasPrefix(parts[2], "alias/"):
		return fmt.Errorf("keyID %q is not an ARN such as acs:kms:<region>:<account>:key/<id>", keyID)
	case parts[0] != region:
		return fmt.Errorf("keyID %q is of region %q, and region is %q", keyID, parts[0], region)
	}
	return nil
}

// endpointOr returns a configured endpoint, which must be host or host:port, or the default if none
// is configured.
func endpointOr(endpoint, byDefault string) (string, error) {
	if endpoint == "" {
		return byDefault, nil
	}
	u, err := url.Parse("https://" + endpoint)
	if err != nil || u.Host != endpoint || u.Hostname() == "" || strings.HasSuffix(endpoint, ":") || strings.ContainsAny(endpoint, " @/\\") {
		return "", fmt.Errorf("endpoint %q is not host or host:port (without https://)", endpoint)
	}
	return endpoint, nil
}

// checkEnvironment refuses what would make the SDK print its requests or panic.
func checkEnvironment() []error {
	var problems []error
	if slices.Contains(strings.Split(os.Getenv("DEBUG"), ","), "sdk") {
		problems = append(problems, errors.New("the environment has DEBUG=sdk, which makes the Alibaba Cloud SDK print tokens and keys; unset it"))
	}
	if fips140.Enforced() {
		problems = append(problems, errors.New("the environment has GODEBUG=fips140=only, which forbids the HMAC-SHA1 that Alibaba Cloud's requests are signed with; use fips140=on"))
	}
	return problems
}

package kmsdouble

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxSkew is how far a request's timestamp may be from the double's clock, either way.
const maxSkew = 15 * time.Minute

// apiError is an error as the vendor answers it.
type apiError struct {
	status        int
	code, message string
}

func missing(parameter string) *apiError {
	return &apiError{400, "Missing" + parameter, parameter + " is mandatory for this action."}
}

// AccessKey is a caller that a double knows.
type AccessKey struct {
	ID, Secret string
	// Token is the security token that a session's requests must carry. A long-term access key has
	// none.
	Token string
	// Expires is when the session ends; zero for never.
	Expires time.Time
}

// gate lets in the signed requests of the callers that it knows. It is safe for concurrent use.
type gate struct {
	version, region string
	now             func() time.Time

	callersMu  sync.Mutex
	accessKeys map[string]AccessKey
	// actions by access key; one that is not in it may do everything
	permitted map[string][]string
	nonces    map[[2]string]time.Time // by access key and nonce
}

func newGate(version, region string, now func() time.Time, callers []AccessKey) *gate {
	g := &gate{version: version, region: cmp.Or(region, "cn-hangzhou"), now: now, accessKeys: map[string]AccessKey{}, permitted: map[string][]string{}, nonces: map[[2]string]time.Time{}}
	if now == nil {
		g.now = time.Now
	}
	if callers == nil {
		callers = []AccessKey{{ID: DefaultAccessKeyID, Secret: DefaultAccessKeySecret}}
	}
	for _, k := range callers {
		g.accessKeys[k.ID] = k
	}
	return g
}

// Region returns the region that requests must name.
func (g *gate) Region() string { return g.region }

// SetAccessKey adds or replaces a caller.
func (g *gate) SetAccessKey(k AccessKey) {
	g.callersMu.Lock()
	defer g.callersMu.Unlock()
	g.accessKeys[k.ID] = k
}

// RemoveAccessKey makes a caller unknown.
func (g *gate) RemoveAccessKey(id string) {
	g.callersMu.Lock()
	defer g.callersMu.Unlock()
	delete(g.accessKeys, id)
}

// verify checks everything about a request that does not depend on its action, and returns who
// signed it. A request that passes has used up its nonce.
func (g *gate) verify(method string, p map[string]string) (AccessKey, *apiError) {
	g.callersMu.Lock()
	defer g.callersMu.Unlock()
	var none AccessKey
	for _, name := range []string{"Action", "Version", "AccessKeyId", "Signature", "SignatureMethod", "SignatureVersion", "SignatureNonce", "Timestamp"} {
		if p[name] == "" {
			return none, missing(name)
		}
	}
	for name, want := range map[string]string{
		"Version": g.version, "Format": "JSON", "SignatureMethod": "HMAC-SHA1", "SignatureVersion": "1.0", "RegionId": g.region,
	} {
		if p[name] != want {
			return none, &apiError{400, "InvalidParameter", fmt.Sprintf("The specified parameter %s is not valid.", name)}
		}
	}
	at, err := time.Parse("2006-01-02T15:04:05Z", p["Timestamp"])
	if err != nil {
		return none, &apiError{400, "InvalidTimeStamp.Format", "Specified time stamp or date value is not well formatted."}
	}
	now := g.now()
	if skew := now.Sub(at); skew > maxSkew || skew < -maxSkew {
		return none, &apiError{400, "IllegalTimestamp", "The input parameter Timestamp that is mandatory for processing this request is not supplied or expired."}
	}
	caller, ok := g.accessKeys[p["AccessKeyId"]]
	if !ok {
		return none, &apiError{404, "InvalidAccessKeyId.NotFound", "Specified access key is not found."}
	}
	if e := checkToken(caller, p["SecurityToken"], now); e != nil {
		return none, e
	}
	text := stringToSign(method, p)
	if !hmac.Equal([]byte(sign(text, caller.Secret)), []byte(p["Signature"])) {
		// The original quotes what it would have signed, secrets and all.
		return none, &apiError{400, "SignatureDoesNotMatch", "Specified signature is not matched with our calculation. server string to sign is:" + text}
	}
	for nonce, used := range g.nonces {
		if now.Sub(used) > 2*maxSkew {
			delete(g.nonces, nonce)
		}
	}
	nonce := [2]string{caller.ID, p["SignatureNonce"]}
	if _, used := g.nonces[nonce]; used {
		return none, &apiError{400, "SignatureNonceUsed", "The request signature nonce has been used."}
	}
	g.nonces[nonce] = now
	return caller, nil
}

func checkToken(caller AccessKey, token string, now time.Time) *apiError {
	switch {
	case caller.Token == "" && token != "":
		return &apiError{400, "InvalidSecurityToken.MismatchWithAccessKey", "Specified SecurityToken mismatch with the AccessKey."}
	case caller.Token != "" && token == "":
		return missing("SecurityToken")
	case caller.Token != token:
		return &apiError{400, "InvalidSecurityToken.Malformed", "Specified SecurityToken is malformed."}
	case !caller.Expires.IsZero() && !now.Before(caller.Expires):
		return &apiError{400, "InvalidSecurityToken.Expired", "Specified SecurityToken is expired."}
	}
	return nil
}

// sign returns the base64 of HMAC-SHA1 over text.
func sign(text, secret string) string {
	mac := hmac.New(sha1.New, []byte(secret+"&"))
	mac.Write([]byte(text))
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// stringToSign covers all parameters, those of the body too, but the signature itself, even empty
// ones.
func stringToSign(method string, p map[string]string) string {
	pairs := make([]string, 0, len(p))
	for _, k := range sortedKeys(p) {
		if k != "Signature" {
			pairs = append(pairs, percentEncode(k)+"="+percentEncode(p[k]))
		}
	}
	return method + "&" + percentEncode("/") + "&" + percentEncode(strings.Join(pairs, "&"))
}

func sortedKeys(p map[string]string) []string {
	keys := make([]string, 0, len(p))
	for k := range p {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// percentEncode encodes all bytes but the unreserved ones of RFC 3986.
func percentEncode(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_', c == '.', c == '~':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

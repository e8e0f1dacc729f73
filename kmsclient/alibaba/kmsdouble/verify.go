package kmsdouble

import (
	"crypto/hmac"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strings"
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

// verify checks everything about a request that does not depend on its action. A request that passes has used up its nonce.
func (d *Double) verify(r *http.Request, p map[string]string) *apiError {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, name := range []string{"Action", "Version", "AccessKeyId", "Signature", "SignatureMethod", "SignatureVersion", "SignatureNonce", "Timestamp"} {
		if p[name] == "" {
			return missing(name)
		}
	}
	for name, want := range map[string]string{
		"Version": "2016-01-20", "Format": "JSON", "SignatureMethod": "HMAC-SHA1", "SignatureVersion": "1.0", "RegionId": d.region,
	} {
		if p[name] != want {
			return &apiError{400, "InvalidParameter", fmt.Sprintf("The specified parameter %s is not valid.", name)}
		}
	}
	at, err := time.Parse("2006-01-02T15:04:05Z", p["Timestamp"])
	if err != nil {
		return &apiError{400, "InvalidTimeStamp.Format", "Specified time stamp or date value is not well formatted."}
	}
	now := d.now()
	if skew := now.Sub(at); skew > maxSkew || skew < -maxSkew {
		return &apiError{400, "IllegalTimestamp", "The input parameter Timestamp that is mandatory for processing this request is not supplied or expired."}
	}
	caller, ok := d.accessKeys[p["AccessKeyId"]]
	if !ok {
		return &apiError{404, "InvalidAccessKeyId.NotFound", "Specified access key is not found."}
	}
	if e := checkToken(caller, p["SecurityToken"], now); e != nil {
		return e
	}
	text := stringToSign(r.Method, p)
	if !hmac.Equal([]byte(sign(text, caller.Secret)), []byte(p["Signature"])) {
		// The original quotes what it would have signed, secrets and all.
		return &apiError{400, "SignatureDoesNotMatch", "Specified signature is not matched with our calculation. server string to sign is:" + text}
	}
	for nonce, used := range d.nonces {
		if now.Sub(used) > 2*maxSkew {
			delete(d.nonces, nonce)
		}
	}
	nonce := [2]string{caller.ID, p["SignatureNonce"]}
	if _, used := d.nonces[nonce]; used {
		return &apiError{400, "SignatureNonceUsed", "The request signature nonce has been used."}
	}
	d.nonces[nonce] = now
	return nil
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

// stringToSign covers all parameters, those of the body too, but the signature itself, even empty ones.
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

package config

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"time"
)

// credentialFields are the fields of AlibabaCredentials other than type, and the types that they
// belong to.
var credentialFields = []struct {
	name  string
	types []string
}{
	{"accessKeyIDFile", []string{"accessKey", "sts", "assumeRole"}},
	{"accessKeySecretFile", []string{"accessKey", "sts", "assumeRole"}},
	{"securityTokenFile", []string{"sts", "assumeRole"}},
	{"base", []string{"assumeRole"}},
	{"externalID", []string{"assumeRole"}},
	{"oidcProviderARN", []string{"oidc"}},
	{"oidcTokenFile", []string{"oidc"}},
	{"roleARN", []string{"oidc", "assumeRole"}},
	{"sessionName", []string{"oidc", "assumeRole"}},
	{"policy", []string{"oidc", "assumeRole"}},
	{"duration", []string{"oidc", "assumeRole"}},
	{"stsEndpoint", []string{"oidc", "assumeRole"}},
	{"stsCAFile", []string{"oidc", "assumeRole"}},
	{"roleName", []string{"ecsRAMRole"}},
	{"allowMetadataV1", []string{"ecsRAMRole"}},
}

var (
	roleARN         = regexp.MustCompile(`^acs:ram::[0-9]{1,20}:role/[A-Za-z0-9._-]{1,64}$`)
	oidcProviderARN = regexp.MustCompile(`^acs:ram::[0-9]{1,20}:oidc-provider/[A-Za-z0-9._-]{1,128}$`)
	ramRoleName     = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	ramSessionName  = regexp.MustCompile(`^[A-Za-z0-9.@_-]{2,64}$`)
)

func (v *validator) alibabaCredentials(at string, c *AlibabaCredentials) {
	known := []string{"accessKey", "sts", "ecsRAMRole", "oidc", "assumeRole"}
	if !slices.Contains(known, c.Type) {
		v.oneOf(at+".type", c.Type, known...)
		return
	}
	for _, f := range credentialFields {
		if v.present(at+"."+f.name) && !slices.Contains(f.types, c.Type) {
			v.report(at+"."+f.name, "write type: "+strings.Join(f.types, " or ")+", or remove it", "has no effect with type %s", c.Type)
		}
	}
	if c.Base != "" {
		v.oneOf(at+".base", c.Base, "accessKey", "sts")
	}
	if c.Type == "assumeRole" && c.Base != "sts" && c.SecurityTokenFile != "" {
		v.report(at+".securityTokenFile", "write base: sts, or remove it", "has no effect with base accessKey")
	}
	for _, f := range []struct {
		name, value string
		pattern     *regexp.Regexp
		hint        string
	}{
		{"roleARN", c.RoleARN, roleARN, "write acs:ram::<account>:role/<name>"},
		{"oidcProviderARN", c.OIDCProviderARN, oidcProviderARN, "write acs:ram::<account>:oidc-provider/<name>"},
		{"roleName", c.RoleName, ramRoleName, "write the role's name, not its ARN"},
		{"sessionName", c.SessionName, ramSessionName, "use 2 to 64 letters, digits, . @ _ and -"},
	} {
		if f.value != "" && !f.pattern.MatchString(f.value) {
			v.report(at+"."+f.name, f.hint, "%q is not of the form that RAM takes", f.value)
		}
	}
	if c.Policy != "" && (len(c.Policy) > 2048 || !json.Valid([]byte(c.Policy))) {
		v.report(at+".policy", "", "is not JSON of at most 2048 characters")
	}
	if c.Duration != 0 && (c.Duration < 15*time.Minute || c.Duration > 12*time.Hour || c.Duration%time.Second != 0) {
		v.report(at+".duration", "the role's own limit is an hour unless it was raised", "%v is not whole seconds from 15m to 12h", c.Duration)
	}
	v.httpsHost(at+".stsEndpoint", c.STSEndpoint)
	v.certPool(at+".stsCAFile", c.STSCAFile)
}

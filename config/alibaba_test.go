package config

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestAlibabaCredentials is the other side of those that are refused: each type with all of its
// fields.
func TestAlibabaCredentials(t *testing.T) {
	dir := t.TempDir()
	ca, _ := pair(t)
	put(t, filepath.Join(dir, "CA"), ca)
	put(t, filepath.Join(dir, "X"), []byte("x"))
	x, role := filepath.Join(dir, "X"), "acs:ram::154035569884:role/etcd.kms-proxy_1"
	for yaml, want := range map[string]AlibabaCredentials{
		"{}": {Type: "accessKey"},
		"{accessKeyIDFile: X, accessKeySecretFile: X}":                                  {Type: "accessKey", AccessKeyIDFile: x, AccessKeySecretFile: x},
		"{type: sts, accessKeyIDFile: X, accessKeySecretFile: X, securityTokenFile: X}": {Type: "sts", AccessKeyIDFile: x, AccessKeySecretFile: x, SecurityTokenFile: x},
		"{type: ecsRAMRole}": {Type: "ecsRAMRole"},
		"{type: ecsRAMRole, roleName: role, allowMetadataV1: true}": {Type: "ecsRAMRole", RoleName: "role", AllowMetadataV1: true},
		"{type: oidc}": {Type: "oidc"},
		"{type: oidc, roleARN: '" + role + "', oidcProviderARN: 'acs:ram::1:oidc-provider/ack-rrsa-c1', oidcTokenFile: X, duration: 15m}": {
			Type: "oidc", RoleARN: role, OIDCProviderARN: "acs:ram::1:oidc-provider/ack-rrsa-c1", OIDCTokenFile: x, Duration: 15 * time.Minute,
		},
		"{type: assumeRole, base: sts, accessKeyIDFile: X, accessKeySecretFile: X, securityTokenFile: X, roleARN: '" + role + "', externalID: e, sessionName: a@b, " +
			`policy: '{"Version": "1"}', duration: 12h, stsEndpoint: 'sts-vpc.cn-hangzhou.aliyuncs.com:443', stsCAFile: CA}`: {
			Type: "assumeRole", Base: "sts", AccessKeyIDFile: x, AccessKeySecretFile: x, SecurityTokenFile: x, RoleARN: role, ExternalID: "e", SessionName: "a@b",
			Policy: `{"Version": "1"}`, Duration: 12 * time.Hour, STSEndpoint: "sts-vpc.cn-hangzhou.aliyuncs.com:443", STSCAFile: filepath.Join(dir, "CA"),
		},
	} {
		file := minimal + "kms: [{name: a, alibaba: {region: r, keyID: 'acs:kms:r:1:key/k', credentials: " + yaml + "}}]\n"
		c, err := parse([]byte(file), dir, readFile, Checks{})
		if err != nil {
			t.Errorf("%s: %v", yaml, err)
			continue
		}
		if diff := cmp.Diff(want, c.KMS[0].Alibaba.Credentials); diff != "" {
			t.Errorf("%s (-want +got):\n%s", yaml, diff)
		}
	}
}

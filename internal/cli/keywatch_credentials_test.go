package cli

import (
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// TestCredentialsWarning: a short session is no reason for a warning.
func TestCredentialsWarning(t *testing.T) {
	double, d := clitest.NewDouble(t, kmsdouble.Config{AccessKeys: []kmsdouble.AccessKey{}}), clitest.NewDir(t)
	sts := kmsdouble.NewSTS(t, kmsdouble.STSConfig{Register: double.SetAccessKey, Lifetime: 6 * time.Minute})
	edits := append(d.OnAlibaba(t, double, "{type: assumeRole, accessKeyIDFile: id, accessKeySecretFile: secret, roleARN: '"+kmsdouble.DefaultRoleARN+
		"', stsEndpoint: '"+sts.Endpoint()+"', stsCAFile: "+sts.CAFile()+"}"), clitest.WithRecovery()...)
	r := execute(t, "kms", "check", "--config", d.Config(t, edits...))
	r.want(t, 0)
	if !strings.Contains(r.stdout, "credentials expire") || strings.Contains(r.stdout, "warning") {
		t.Errorf("a good session of six minutes:\n%s", r.stdout)
	}
}

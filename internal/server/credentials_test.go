package server

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// TestCredentialsWarning: a short session is nothing to warn of, a refresh that fails is one, and
// it is over when the next is good.
func TestCredentialsWarning(t *testing.T) {
	double, d := clitest.NewDouble(t, kmsdouble.Config{AccessKeys: []kmsdouble.AccessKey{}}), clitest.NewDir(t)
	sts := kmsdouble.NewSTS(t, kmsdouble.STSConfig{Register: double.SetAccessKey, Lifetime: 6 * time.Minute})
	edits := append(d.OnAlibaba(t, double, "{type: assumeRole, accessKeyIDFile: id, accessKeySecretFile: secret, roleARN: '"+kmsdouble.DefaultRoleARN+
		"', stsEndpoint: '"+sts.Endpoint()+"', stsCAFile: "+sts.CAFile()+"}"), clitest.WithRecovery()...)
	sts.SetLifetime(4 * time.Second)
	a, _ := newRunningIn(t, d, edits...)
	defer runRings(t, a)()
	warns := func() bool {
		return strings.Contains(metricsOf(t, a), `etcd_kms_proxy_kms_key_warning{kind="credentials_expire",provider="dev"} 1`)
	}
	clitest.Eventually(t, "first session", func() bool { return a.keys.Rings()[0].State().CanSeal })
	if warns() {
		t.Error("a warning without a failure")
	}
	sts.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &kmsdouble.FaultSpec{Kind: kmsdouble.Throttle} })
	clitest.Eventually(t, "warning", warns)
	sts.SetFault(nil)
	sts.SetLifetime(time.Hour)
	clitest.Eventually(t, "end of the warning", func() bool { return !warns() })
}

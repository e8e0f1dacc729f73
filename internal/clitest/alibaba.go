package clitest

import (
	"os"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// OnAlibaba returns the edits of a configuration whose provider "dev" is the double.
func (d Dir) OnAlibaba(t *testing.T, double *kmsdouble.Double, credentials string) []string {
	t.Helper()
	for name, text := range map[string]string{"id": kmsdouble.DefaultAccessKeyID, "secret": kmsdouble.DefaultAccessKeySecret} {
		if err := os.WriteFile(d.Path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return []string{"local: {keyFile: key.yaml}", `pollInterval: 1s
  alibaba:
    region: ` + double.Region() + `
    keyID: ` + kmsdouble.DefaultKeyID + `
    endpoint: ` + double.Endpoint() + `
    caFile: ` + double.CAFile() + `
    credentials: ` + credentials}
}

// FileCredentials are the credentials that [Dir.OnAlibaba] has written.
const FileCredentials = "{accessKeyIDFile: id, accessKeySecretFile: secret}"

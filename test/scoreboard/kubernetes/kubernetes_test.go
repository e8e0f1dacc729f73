package kubernetes

import (
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/scoreboard/suite"
)

// TestStorage runs the tests of the API server's storage, of its watch cache, and of what is above
// them.
func TestStorage(t *testing.T) {
	server := "pkg/storage/etcd3/testserver/test_server.go"
	suite.Run(t, suite.Suite{
		Name:   "Kubernetes' storage tests",
		Module: module,
		Parts:  []string{"pkg"},
		Packages: []string{
			"pkg/storage/etcd3", "pkg/storage/cacher", "pkg/storage/storagebackend/factory", "pkg/registry/generic/registry",
		},
		Edits: []suite.Edit{
			{File: server, Old: "e, err := embed.StartEtcd(cfg)", New: "startProxy := putInFront(t, cfg)\n\te, err := embed.StartEtcd(cfg)"},
			{File: server, Old: "tlsConfig, err := cfg.ClientTLSInfo.ClientConfig()", New: "startProxy()\n\ttlsConfig, err := cfg.ClientTLSInfo.ClientConfig()"},
		},
		Files: map[string]string{
			"pkg/storage/etcd3/testserver/front/front.go": "../testdata/front/front.go",
			"pkg/storage/etcd3/testserver/front.go":       "testdata/testserver.go",
		},
		Known:  "testdata/known.txt",
		Tests:  200,
		Values: 1000,
	})
}

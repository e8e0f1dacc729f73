package scoreboard

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/scoreboard/suite"
)

// TestIntegration runs the tests that use etcd's Go client, with etcd in the same process.
func TestIntegration(t *testing.T) {
	suite.Run(t, suite.Suite{
		Name:   "etcd's integration tests",
		Module: module,
		Parts:  []string{"common", "framework", "integration", "fixtures"},
		Packages: []string{
			"integration", "integration/clientv3", "integration/clientv3/concurrency", "integration/clientv3/connectivity", "integration/clientv3/examples",
			"integration/clientv3/experimental/recipes", "integration/clientv3/lease", "integration/clientv3/naming", "integration/clientv3/snapshot",
			"integration/clientv3/watch",
		},
		Edits: []suite.Edit{
			{File: "framework/integration/cluster.go", Old: "etcdserver.NewServer(m.ServerConfig)", New: "etcdserver.NewServer(withRoom(m.ServerConfig))"},
			{File: "framework/integration/cluster.go", Old: "v3rpc.Server(m.Server, tlscfg,", New: "v3rpc.Server(m.Server, behindFront(tlscfg),"},
			{File: "framework/integration/cluster.go", Old: "go m.GRPCServer.Serve(m.GRPCListener)", New: "go m.GRPCServer.Serve(m.front())"},
		},
		Files: map[string]string{
			"framework/front/front.go":       "testdata/front/front.go",
			"framework/integration/front.go": "testdata/integration.go",
			"integration/cache_test.go":      "", // tests a library that is not a published module
		},
		Known: "testdata/known.txt",
		Tests: 400,
	})
}

// TestEndToEnd runs the tests that start etcd as a process and use etcdctl, curl and etcd's Go
// client.
func TestEndToEnd(t *testing.T) {
	process := "framework/e2e/etcd_process.go"
	suite.Run(t, suite.Suite{
		Name:     "etcd's end-to-end tests",
		Module:   module,
		Parts:    []string{"common", "framework", "e2e", "fixtures", "robustness"},
		Packages: []string{"common", "e2e"},
		Args:     []string{"-tags=e2e"},
		TestArgs: []string{"-bin-dir=" + programs(t)},
		Edits: []suite.Edit{
			{File: process, Old: "\tproxy      proxy.Server\n", New: "\tproxy      proxy.Server\n\tfront      *memberFront\n"},
			{
				File: process, Old: "ep := &EtcdServerProcess{cfg: cfg, donec: make(chan struct{})}",
				New: "ep := &EtcdServerProcess{cfg: cfg, donec: make(chan struct{}), front: putInFront(cfg)}",
			},
			{File: process, Old: "err = ep.waitReady(ctx)", New: "err = ep.front.start(ep.waitReady(ctx))"},
			{File: process, Old: "\tep.cfg.lg.Info(\"stopping server...\"", New: "\tep.front.stop()\n\tep.cfg.lg.Info(\"stopping server...\""},
			{File: process, Old: "\tep.cfg.lg.Info(\"stopped server.\"", New: "\tep.front.check()\n\tep.cfg.lg.Info(\"stopped server.\""},
			{File: process, Old: "\tep.cfg.lg.Info(\"closing server...\"", New: "\tep.front.stop()\n\tep.cfg.lg.Info(\"closing server...\""},
			{File: process, Old: "\tep.cfg.lg.Info(\"killing server...\"", New: "\tep.front.kill()\n\tep.cfg.lg.Info(\"killing server...\""},
			// The proxy does not serve /debug: it is for operators, at etcd's own address.
			{File: "e2e/cmux_test.go", Old: "assert.NoError(t, fetchDebugVars(httpEndpoint, httpVersion, connType))", New: "_ = fetchDebugVars"},
		},
		Files: map[string]string{
			"framework/front/front.go": "testdata/front/front.go",
			"framework/e2e/front.go":   "testdata/e2e.go",
		},
		Known:   "testdata/e2e-known.txt",
		LeftOut: "testdata/e2e-left-out.txt",
		Tests:   200,
		Values:  1000,
	})
}

// programs returns a folder with etcd's programs, under the names that its tests expect.
func programs(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		return ""
	}
	dir := t.TempDir()
	for name, program := range map[string]string{"etcd": "etcd-3.7", "etcd-last-release": "etcd-3.6", "etcdctl": "etcdctl-3.7", "etcdutl": "etcdutl-3.7"} {
		if err := os.Symlink(suite.Binary(t, program, "make scoreboard"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

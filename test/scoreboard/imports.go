//go:build imports

package scoreboard

// The tests that run are in go.mod because of these imports. They are never built, since the tests
// are built from a copy.
import (
	_ "go.etcd.io/etcd/etcdutl/v3/snapshot"
	_ "go.etcd.io/etcd/tests/v3/framework/e2e"
	_ "go.etcd.io/etcd/tests/v3/framework/integration"
	_ "go.etcd.io/etcd/tests/v3/robustness/report"
)

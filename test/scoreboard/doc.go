// Package scoreboard runs etcd's own client tests (module go.etcd.io/etcd/tests/v3) with a proxy
// in front of each member that encrypts every key: the integration tests, and those of the
// end-to-end tests in which clients use etcd (etcdctl, curl, the Go client).
//
// The tests run from a copy of the module, in which each member's clients connect to the proxy:
// testdata/integration.go and testdata/e2e.go. A test that fails there and passes with etcd
// itself is a failure of the proxy, unless testdata/known.txt or testdata/e2e-known.txt gives a
// reason.
//
// SCOREBOARD_RUN selects tests like go test -run, SCOREBOARD_PACKAGES packages, and
// SCOREBOARD_SHARD a part of the tests, for example 2/3. SCOREBOARD_BARE=1 leaves the proxy out.
// SCOREBOARD_LOG=1 shows the proxies' logs.
package scoreboard

const module = "go.etcd.io/etcd/tests/v3"

// Package scoreboard runs etcd's own client tests (module go.etcd.io/etcd/tests/v3) with a proxy in
// front of each member that encrypts every key.
//
// The tests are a copy of the module, in which each member's clients connect to the proxy instead
// of the member's gRPC server: see testdata/front.go. A test that fails there and passes with etcd
// itself is a failure of the proxy, unless testdata/known.txt gives a reason.
//
// SCOREBOARD_RUN selects tests like go test -run, and SCOREBOARD_PACKAGES packages.
// SCOREBOARD_BARE=1 leaves the proxy out. SCOREBOARD_LOG=1 shows the proxies' logs.
package scoreboard

import _ "go.etcd.io/etcd/tests/v3/framework/integration" // go.mod has the version of the tests

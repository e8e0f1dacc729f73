// Package scoreboard runs etcd's own client tests (module go.etcd.io/etcd/tests/v3) with a proxy that seals every key in front of each member.
//
// The tests are a copy of the module, in which each member's clients meet the proxy where they met the member's gRPC server: see testdata/front.go. What fails
// there and passes on etcd itself is a failure of the proxy's, unless testdata/known.txt says why it cannot be otherwise.
//
// SCOREBOARD_RUN chooses tests as go test -run does, SCOREBOARD_PACKAGES packages; SCOREBOARD_BARE=1 leaves the proxy out; SCOREBOARD_LOG=1 shows what proxies log.
package scoreboard

import _ "go.etcd.io/etcd/tests/v3/framework/integration" // the version of the tests is that of go.mod

// Package kubernetes runs the storage tests of Kubernetes (module k8s.io/apiserver) with a proxy
// in front of each etcd that encrypts every key.
//
// The tests run from a copy of the module, in which the etcd that they start has a proxy in front
// of it: testdata/testserver.go. A test that fails there and passes with etcd itself is a failure
// of the proxy, unless testdata/known.txt gives a reason.
//
// The variables are those of the package scoreboard.
package kubernetes

const module = "k8s.io/apiserver"

// Package interop contains only tests: this project's stored format against the code of
// kube-apiserver that defines it.
//
// k8s.io/apiserver's KMS v2 transformer and crypto/keyring use the same KMS v2 plugin on a unix
// socket. Each reads what the other writes, and both refuse, or accept, the same damaged bytes. The
// package also maintains the golden vectors that k8s.io/apiserver produced
// (crypto/envelope/testdata/kubernetes-vectors.json, updated with -update), and compares the speed
// of both.
//
// It is a separate module to keep k8s.io/apiserver out of the product's dependencies.
package interop

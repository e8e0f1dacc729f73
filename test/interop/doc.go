// Package interop holds only tests: this project's stored format against the code of kube-apiserver that defines it.
//
// k8s.io/apiserver's KMS v2 transformer and crypto/keyring work side by side through one KMS v2 plugin on a unix socket. Each reads what the
// other writes, and both refuse, or accept, the same damaged bytes. The package also keeps the golden vectors that
// k8s.io/apiserver produced (crypto/envelope/testdata/kubernetes-vectors.json, written anew with -update), and compares the speed of both.
//
// The module is its own so that k8s.io/apiserver stays out of the product's dependencies.
package interop

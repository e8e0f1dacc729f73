//go:build imports

package kubernetes

// The tests that run are in go.mod because of these imports. They are never built, since the tests
// are built from a copy.
import (
	_ "k8s.io/apiserver/pkg/registry/generic/registry"
	_ "k8s.io/apiserver/pkg/storage/cacher"
	_ "k8s.io/apiserver/pkg/storage/etcd3/testserver"
	_ "k8s.io/apiserver/pkg/storage/storagebackend/factory"
	_ "k8s.io/apiserver/pkg/storage/testing"
)

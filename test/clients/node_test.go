package clients

import (
	"path/filepath"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestNode runs npm's etcd3 over gRPC.
func TestNode(t *testing.T) {
	t.Parallel()
	env := []string{"NODE_PATH=" + filepath.Join(harness.BinDir(t), "node", "node_modules")}
	needs(t, "install Node.js and npm, then make tools", "env", append(env, "node", "-e", "require('etcd3')")...)
	everyWay(t, "npm's etcd3", func(t *testing.T, p *pair) {
		p.program(t, env, "node", "testdata/etcd3_client.js")
		p.sealed(t)
	})
}

// Package lifecycle looks at, and changes, what etcd stores under the proxy's rules: directly in etcd, past the proxy, while the cluster runs.
package lifecycle

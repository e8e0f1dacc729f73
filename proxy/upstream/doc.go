// Package upstream connects to etcd: a pool of connections for calls that the proxy handles, single
// connections for calls that it relays, HTTP/1.1 for etcd's own paths, and etcd's client library
// for commands. It keeps calls off learners, and marks every request so that another proxy refuses
// it. It does not retry calls of clients and does not inspect them.
package upstream

// Package gateway serves HTTP: etcd's JSON API under /v3/, with websockets, by the handlers that
// etcd generates, and the paths where etcd reports its health, version and metrics. Each JSON
// request becomes a call of package etcdapi, in the name of its client. It refuses what web pages
// of other origins can have a browser send.
package gateway

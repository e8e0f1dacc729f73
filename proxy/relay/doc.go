// Package relay serves the connections of clients that speak HTTP/2. It relays the frames of most
// calls between a client's connection and connections to etcd that belong to this client alone, and
// rewrites values in place. All other calls are handled by functions of package etcdapi, each on a
// goroutine of its own, and web requests by an http.Handler.
//
// One goroutine reads each connection and never blocks. A direction of a call that needs the KMS
// moves to a goroutine of its own until it has caught up.
package relay

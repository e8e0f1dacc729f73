// Package etcdapi is the API of etcd as the proxy serves it: the closed table of methods
// ([MethodTable]), the rules that say which keys are encrypted, and for each method what happens to
// its requests and responses ([Call]). A call is relayed by package relay, which uses Call alone,
// or handled by [Method.Handle], on the stream interface of gRPC. [LocalConn] calls the handlers in
// memory: for the JSON gateway, and for etcd's own Election and Lock services, which run here where
// a rule covers their keys.
//
// To add a method of etcd, add a row to the table. A method that carries values also needs a Call.
package etcdapi

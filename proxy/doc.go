// Package proxy serves etcd's client API and encrypts the values under its rules. It composes the
// data path of the packages below it: [New] makes a [Proxy] from a [Config], [Proxy.Run] serves.
//
// A call goes down once and comes back once:
//
//	client
//	  │  listener   accepts, authenticates, detects the protocol
//	  ▼
//	relay           terminates HTTP/2 (http2conn). A call is relayed, frame by frame,
//	  │             or handled by a function of etcdapi
//	  │  gateway    HTTP: the JSON API, which calls the same functions in memory
//	  ▼
//	etcdapi         method table, rules, one file per method or service of etcd;
//	  │             etcdwire finds and replaces values in messages,
//	  │             Sealer.Seal encrypts them, Sealer.Open decrypts them,
//	  │             valuetxn compares and sorts by them
//	  ▼
//	upstream        connections to etcd
//	  ▼
//	etcd
//
// What a client gets back is etcd's own response: headers, trailers, status and details. Texts of
// the proxy's own begin with "etcd-kms-proxy: ".
//
// The packages share messages, buffers and statuses (rpc), metrics (metrics) and TLS files
// (tlsfiles). None of them reads configuration files, knows a KMS or a stored format, caches a
// response or retries a call. internal/server is the caller of this package.
package proxy

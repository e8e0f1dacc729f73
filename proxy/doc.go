// Package proxy is the data path between etcd's clients and etcd: listeners, the identity of each connection, the closed table
// of methods, the rules that say which keys are sealed, the connections to etcd, and the engines that move messages.
//
// A call goes down once and comes back once:
//
//	client → listener → engine → rewriter (requests) → rules → Sealer.Seal → etcd
//	etcd → engine → rewriter (responses) → rules → Sealer.Open → client
//
// The listener layer accepts a connection, authenticates it and says who it is; an [engine] only moves messages. The method
// table, the rewriter and the rules are the same for every engine. What a client gets back is etcd's own answer, headers, trailers,
// status and details; texts of the proxy's own begin with "etcd-kms-proxy: ".
//
// The package does not read configuration files, knows no KMS and no stored format, caches nothing and retries nothing. cmd is its caller.
package proxy

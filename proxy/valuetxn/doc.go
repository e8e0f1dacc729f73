// Package valuetxn serves requests that compare or sort by encrypted values, which etcd cannot: it
// has only ciphertexts. A transaction is decided here and proven to etcd by compares of revisions;
// a range is sorted here as etcd would sort it. It reaches etcd through a [Store], which encrypts
// and decrypts, and knows no rules and no KMS.
package valuetxn

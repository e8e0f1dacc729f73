// Package valuetxn serves requests that compare or sort by encrypted values. etcd cannot serve
// them, because it has only ciphertexts. [Txn] evaluates the compares of a transaction, and sends
// etcd the chosen branch with compares of revisions. [Range] sorts as etcd would sort the
// plaintexts. The package accesses etcd through a [Store], which encrypts and decrypts. It knows no
// rules and no KMS.
package valuetxn

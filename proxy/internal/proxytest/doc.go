// Package proxytest has the doubles that the tests of the data path share: an etcd whose responses
// a test writes, Sealers that anyone can check, a certificate authority, a client that speaks
// HTTP/2 frame by frame, and a world that compares etcd behind the proxy with etcd alone.
package proxytest

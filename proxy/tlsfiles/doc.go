// Package tlsfiles keeps TLS configurations up to date with their files, and says when the
// certificates in them expire. Listeners and connections to etcd use it.
package tlsfiles

// Package listener accepts connections of clients: it performs the TLS handshake, finds the
// [Identity] of the client, decides by the client lists what the client may do, and detects whether
// it speaks HTTP/2. It ends connections whose client may no longer connect.
//
// A client whose certificate the TLS handshake accepts is connected even if it is not in the list
// of allowed clients. Then [Identity.Denied] is set, and each of its requests is refused: by
// package relay for gRPC and by package gateway for HTTP, with Authorize and Deny of etcdapi.API.
package listener

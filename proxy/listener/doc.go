// Package listener accepts connections of clients: it performs the TLS handshake, finds the
// [Identity] of the client, applies the lists of allowed clients, and detects whether the client
// speaks HTTP/2. It ends connections whose client may no longer connect. It serves no request.
package listener

// Package rpc has what all layers of the data path share about gRPC: messages as bytes in pooled
// buffers, compression, the metadata of a response and statuses of the proxy's own. It sends and
// receives nothing.
package rpc

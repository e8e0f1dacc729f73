//go:build !race

package http2conn

// raced says that the race detector is on, which allocates.
const raced = false

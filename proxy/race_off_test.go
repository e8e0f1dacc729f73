//go:build !race

package proxy

// raced says that the race detector is on, which allocates.
const raced = false

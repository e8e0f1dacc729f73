// Package metrics has the Prometheus metrics of the data path, and the [Stopwatch] that measures
// how much time the proxy adds to a call.
package metrics

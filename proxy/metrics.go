package proxy

import (
	"errors"
	"fmt"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// metrics are the proxy's own figures, and the grpc_server_* ones that etcd has too.
type metrics struct {
	requests          *prometheus.CounterVec
	connections       *prometheus.GaugeVec
	handshakeFailures *prometheus.CounterVec
	upstreamUp        prometheus.Gauge
	grpc              *grpcprom.ServerMetrics
}

// newMetrics registers with r; nil keeps the figures to themselves.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_requests_total", Help: "Calls that have ended, by method and gRPC code.",
		}, []string{"method", "code"}),
		connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_connections", Help: "Open client connections, by listener.",
		}, []string{"listener"}),
		handshakeFailures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_rejected_connections_total", Help: "Connections that failed to identify themselves, by listener.",
		}, []string{"listener"}),
		upstreamUp: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_etcd_connected", Help: "1 while at least one etcd endpoint is connected.",
		}),
		grpc: grpcprom.NewServerMetrics(),
	}
	if r == nil {
		return m, nil
	}
	var problems []error
	for _, c := range []prometheus.Collector{m.requests, m.connections, m.handshakeFailures, m.upstreamUp, m.grpc} {
		if err := r.Register(c); err != nil {
			problems = append(problems, fmt.Errorf("register metrics: %w", err))
		}
	}
	return m, errors.Join(problems...)
}

// unknownMethod is the label of every method outside the table: a client must not be able to make new labels.
const unknownMethod = "unknown"

// requestCounter counts the calls of one method; the common case finds its counter without a lookup.
type requestCounter struct {
	vec    *prometheus.CounterVec
	method string
	ok     prometheus.Counter
}

func (m *metrics) counter(method string) *requestCounter {
	return &requestCounter{vec: m.requests, method: method, ok: m.requests.WithLabelValues(method, codes.OK.String())}
}

func (c *requestCounter) count(code codes.Code) {
	if code == codes.OK {
		c.ok.Inc()
		return
	}
	c.vec.WithLabelValues(c.method, code.String()).Inc()
}

package metrics

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// Metrics are the proxy's own figures, and the grpc_server_* ones under etcd's names and labels, so
// that etcd's dashboards work here too.
type Metrics struct {
	requests          *prometheus.CounterVec
	Connections       *prometheus.GaugeVec
	HandshakeFailures *prometheus.CounterVec
	EndedConnections  *prometheus.CounterVec
	UpstreamUp        prometheus.Gauge
	added             prometheus.Histogram

	started, handled, received, sent *prometheus.CounterVec
}

// New registers with r; nil keeps the figures to themselves.
func New(r prometheus.Registerer) (*Metrics, error) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	const grpcType, grpcService, grpcMethod, grpcCode = "grpc_type", "grpc_service", "grpc_method", "grpc_code"
	m := &Metrics{
		requests: counter("etcd_kms_proxy_requests_total", "Calls that have ended. Unknown methods count as unknown.", "method", "code"),
		Connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_connections", Help: "Open client connections, by listener.",
		}, []string{"listener"}),
		HandshakeFailures: counter("etcd_kms_proxy_rejected_connections_total", "Failed TLS handshakes, and clients that ended within their first bytes. Connections on which the client sent nothing, such as TCP health checks, are not counted.", "listener"),
		EndedConnections:  counter("etcd_kms_proxy_ended_connections_total", "Connections that ended because the client may no longer connect. reason: certificate (revoked, expired, its CA removed), lists (the client lists changed).", "listener", "reason"),
		UpstreamUp: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_etcd_connected", Help: "1 while at least one etcd endpoint is connected.",
		}),
		// Native buckets for servers that take them, and classic ones for all others.
		added: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "etcd_kms_proxy_added_latency_seconds",
			Help:                        "Time that the proxy itself adds to a unary call, with KMS calls and without etcd, of one in 16 calls of a connection.",
			Buckets:                     []float64{.00001, .000025, .00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100, NativeHistogramMinResetDuration: time.Hour,
		}),
		started:  counter("grpc_server_started_total", "Calls that have begun. As etcd's metric of the same name.", grpcType, grpcService, grpcMethod),
		handled:  counter("grpc_server_handled_total", "Calls that have ended, by gRPC code. As etcd's metric of the same name.", grpcType, grpcService, grpcMethod, grpcCode),
		received: counter("grpc_server_msg_received_total", "Messages received from clients. As etcd's metric of the same name.", grpcType, grpcService, grpcMethod),
		sent:     counter("grpc_server_msg_sent_total", "Messages sent to clients. As etcd's metric of the same name.", grpcType, grpcService, grpcMethod),
	}
	if r == nil {
		return m, nil
	}
	var problems []error
	for _, c := range []prometheus.Collector{m.requests, m.Connections, m.HandshakeFailures, m.EndedConnections, m.UpstreamUp, m.added, m.started, m.handled, m.received, m.sent} {
		if err := r.Register(c); err != nil {
			problems = append(problems, fmt.Errorf("register metrics: %w", err))
		}
	}
	return m, errors.Join(problems...)
}

// ExpectListener has the figures of a listener begin at 0: an increase from a counter that was not
// there is none to Prometheus.
func (m *Metrics) ExpectListener(address string, certificates bool) {
	m.Connections.WithLabelValues(address)
	m.HandshakeFailures.WithLabelValues(address)
	if certificates {
		m.EndedConnections.WithLabelValues(address, EndedCertificate)
		m.EndedConnections.WithLabelValues(address, EndedLists)
	}
}

// The reasons for which a connection ends before its client wants it.
const (
	EndedCertificate = "certificate"
	EndedLists       = "lists"
)

// lastCode is the greatest of gRPC's codes.
const lastCode = codes.Unauthenticated

// Method are the figures of one method. Every label is resolved when it is made, so that counting
// costs no lookup, and every series is there from the start, as etcd's are.
type Method struct {
	Started, Received, Sent prometheus.Counter
	Added                   prometheus.Observer
	handled, requests       [lastCode + 1]prometheus.Counter
}

// ForMethod returns the figures of a method, which is of the kind that gRPC's metrics name.
func (m *Metrics) ForMethod(kind, service, name string) *Method {
	mm := &Method{
		Started:  m.started.WithLabelValues(kind, service, name),
		Received: m.received.WithLabelValues(kind, service, name),
		Sent:     m.sent.WithLabelValues(kind, service, name),
		Added:    m.added,
	}
	for code := codes.OK; code <= lastCode; code++ {
		mm.handled[code] = m.handled.WithLabelValues(kind, service, name, code.String())
		mm.requests[code] = m.requests.WithLabelValues("/"+service+"/"+name, code.String())
	}
	return mm
}

// UnknownMethod is the figure for every method outside the table: a client must not be able to make
// new labels.
func (m *Metrics) UnknownMethod() prometheus.Counter {
	return m.requests.WithLabelValues("unknown", codes.Unimplemented.String())
}

// End counts the end of a call. An etcd that makes up a code of its own is counted under Unknown.
func (m *Method) End(code codes.Code) {
	if code > lastCode {
		code = codes.Unknown
	}
	m.handled[code].Inc()
	m.requests[code].Inc()
}

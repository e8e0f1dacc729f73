package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
)

// HTTP reaches etcd over HTTP/1.1: the first of its URLs that answers.
type HTTP struct {
	*http.Transport
	upstream  *Cluster
	endpoints []string
	Tls       *Credentials // of those that begin with https://; may be nil
	separate  bool         // endpoints are UpstreamConfig.HTTPEndpoints
	once      sync.Once    // logs that they do not speak HTTP/1.1
}

const (
	// responseTimeout is how long etcd may take to respond.
	responseTimeout = time.Minute
	// idleConnTimeout is how long a connection stays without requests.
	idleConnTimeout = 5 * time.Minute
)

// newHTTP makes the way to cfg's HTTP endpoints, which are its endpoints unless it says
// otherwise.
func newHTTP(cfg Config, u *Cluster) (*HTTP, error) {
	e := &HTTP{upstream: u, endpoints: cfg.Endpoints, Tls: u.TLS}
	if len(cfg.HTTPEndpoints) > 0 {
		if len(cfg.HTTPEndpoints) != len(cfg.Endpoints) {
			return nil, fmt.Errorf("etcd HTTP endpoints: there are %d for %d endpoints", len(cfg.HTTPEndpoints), len(cfg.Endpoints))
		}
		e.endpoints, e.separate = cfg.HTTPEndpoints, true
		if e.Tls == nil {
			var err error
			if e.Tls, err = cfg.TLS.credentials(u.log); err != nil {
				return nil, err
			}
		}
	}
	e.Transport = &http.Transport{
		// The scheme and address that a request names do not count.
		DialContext:           func(ctx context.Context, _, _ string) (net.Conn, error) { return e.dial(ctx) },
		ResponseHeaderTimeout: responseTimeout, IdleConnTimeout: idleConnTimeout, MaxIdleConns: 16, MaxIdleConnsPerHost: 16,
	}
	return e, nil
}

// errNoConnection is that of an endpoint that cannot be connected to.
var errNoConnection = errors.New("no connection")

func (e *HTTP) dial(ctx context.Context) (net.Conn, error) {
	var last error
	for _, endpoint := range e.endpoints {
		creds := e.upstream.TLS
		if e.separate {
			if creds = nil; strings.HasPrefix(endpoint, "https://") || strings.HasPrefix(endpoint, "unixs://") {
				creds = e.Tls
			}
		}
		limited, cancel := context.WithTimeout(ctx, ConnectWait)
		conn, _, err := dialEndpoint(limited, endpoint, creds, tlsfiles.ProtocolHTTP1)
		cancel()
		if err == nil {
			return conn, nil
		}
		if errors.Is(err, errProtocol) || errors.Is(err, tls.AlertError(alertNoProtocol)) {
			last = err
		} else if last == nil {
			last = fmt.Errorf("%w: %w", errNoConnection, err)
		}
	}
	return nil, last
}

// alertNoProtocol is TLS' alert no_application_protocol (RFC 7301).
const alertNoProtocol = 120

// Explain says why there is no response, and logs once that etcd serves HTTP elsewhere.
func (e *HTTP) Explain(ctx context.Context, err error) string {
	if ctx.Err() != nil || errors.Is(err, errNoConnection) || errors.Is(err, context.DeadlineExceeded) {
		return "etcd is unreachable"
	}
	setting := "etcd.endpoints"
	if e.separate {
		setting = "etcd.httpEndpoints"
	}
	e.once.Do(func() {
		e.upstream.log.Warn("etcd does not answer HTTP/1.1 at "+setting+": /health, /livez, /readyz, /version and /metrics are not served on client listeners",
			"endpoints", e.endpoints, "hint", "if etcd runs with --listen-client-http-urls, write these URLs to etcd.httpEndpoints")
	})
	return "etcd does not answer HTTP/1.1 at " + setting + ": if it runs with --listen-client-http-urls, write these URLs to etcd.httpEndpoints in the proxy's configuration"
}

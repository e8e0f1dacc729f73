package kubeadm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
)

const (
	pollEvery   = 500 * time.Millisecond
	pollTimeout = 5 * time.Second
	// requiredPolls is how many polls in a row must succeed: an API server that kubelet is about to
	// stop is still ready.
	requiredPolls = 4
)

// poll calls check until it has returned nil several times in a row. At the timeout it returns
// failure with the last error of check.
func (n *Node) poll(ctx context.Context, failure string, check func(context.Context) error) error {
	deadline, cancel := context.WithTimeout(ctx, n.Timeout)
	defer cancel()
	last := errors.New("no check was made")
	for good := 0; ; {
		limited, cancel := context.WithTimeout(deadline, pollTimeout)
		err := check(limited)
		cancel()
		if err == nil {
			if good++; good == requiredPolls {
				return nil
			}
		} else {
			good = 0
			if deadline.Err() == nil {
				last = err
			}
		}
		select {
		case <-deadline.Done():
			if ctx.Err() != nil {
				return fmt.Errorf("interrupted while %s", failure)
			}
			return fmt.Errorf("%s within %v: %w", failure, n.Timeout, last)
		case <-time.After(pollEvery):
		}
	}
}

const maxBody = 4 << 20 // bytes; metrics are the largest

// get returns the body of the response to a GET request. A status other than 200 is an error, with
// the failed checks in the body.
func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		text := url + ": " + res.Status
		if failed := readiness.Failed(string(body)); len(failed) > 0 {
			text += ": " + strings.Join(failed, ", ")
		}
		return nil, errors.New(text)
	}
	return body, nil
}

// httpClient returns a client that ignores HTTP_PROXY and the like.
func httpClient(t *tls.Config) *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: t, DisableKeepAlives: true}}
}

// proxyReady returns why the proxy on this node is not ready, or nil. The proxy reports itself
// ready if it can serve any request; here its KMS and its rules must be ready too. Its other checks
// are about other proxies, and about stored values.
func (n *Node) proxyReady(ctx context.Context) error {
	body, err := get(ctx, httpClient(nil), "http://"+n.Settings.Admin+"/readyz")
	if err != nil {
		return err
	}
	for _, line := range readiness.Failed(string(body)) {
		if strings.HasPrefix(line, "[-]kms ") || strings.HasPrefix(line, "[-]rule ") {
			return fmt.Errorf("proxy: %s", line)
		}
	}
	return nil
}

// metrics are the proxy's metrics that this package uses.
type metrics struct {
	connections int
	started     float64 // Unix time of the process, 0 if unknown
}

func (n *Node) proxyMetrics(ctx context.Context) (*metrics, error) {
	body, err := get(ctx, httpClient(nil), "http://"+n.Settings.Admin+"/metrics")
	if err != nil {
		return nil, err
	}
	f := new(metrics)
	for s := bufio.NewScanner(bytes.NewReader(body)); s.Scan(); {
		name, value, ok := strings.Cut(s.Text(), " ")
		v, err := strconv.ParseFloat(value, 64)
		switch {
		case !ok || err != nil:
		case strings.HasPrefix(name, "etcd_kms_proxy_connections{"):
			f.connections += int(v)
		case name == "process_start_time_seconds":
			f.started = v
		}
	}
	return f, nil
}

// apiReady returns why the API server on this node is not ready, or nil. It accepts the certificate
// in the manifest's --tls-cert-file only, or one of the cluster's CA for the same name.
func (n *Node) apiReady(ctx context.Context, m *Manifest) error {
	certs, err := certificates(m.Flag("tls-cert-file"))
	if err != nil {
		return err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	for _, c := range certs {
		config.RootCAs.AddCert(c)
	}
	if cas, err := certificates(m.Flag("client-ca-file")); err == nil {
		for _, c := range cas {
			config.RootCAs.AddCert(c)
		}
	}
	switch leaf := certs[0]; {
	case len(leaf.DNSNames) > 0:
		config.ServerName = leaf.DNSNames[0]
	case len(leaf.IPAddresses) > 0:
		config.ServerName = leaf.IPAddresses[0].String()
	}
	// Where anonymous requests are disabled, the API server requires a client certificate.
	if pair, err := tls.LoadX509KeyPair(m.Flag("kubelet-client-certificate"), m.Flag("kubelet-client-key")); err == nil {
		config.Certificates = []tls.Certificate{pair}
	}
	host, port := m.Flag("bind-address"), m.Flag("secure-port")
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	if port == "" {
		port = "6443"
	}
	_, err = get(ctx, httpClient(config), "https://"+net.JoinHostPort(host, port)+"/readyz?verbose")
	return err
}

// waitThroughProxy waits until the API server is ready and uses the proxy.
func (n *Node) waitThroughProxy(ctx context.Context, m *Manifest) error {
	return n.poll(ctx, "the API server was not ready and connected to the proxy", func(ctx context.Context) error {
		if err := n.apiReady(ctx, m); err != nil {
			return fmt.Errorf("API server: %w", err)
		}
		f, err := n.proxyMetrics(ctx)
		if err != nil {
			return fmt.Errorf("proxy: %w", err)
		}
		if f.connections == 0 {
			return errors.New("no client is connected to the proxy: kubelet has not yet restarted the API server")
		}
		return nil
	})
}

// waitWithoutProxy waits until the API server is ready and does not use the proxy.
func (n *Node) waitWithoutProxy(ctx context.Context, m *Manifest) error {
	return n.poll(ctx, "the API server was not ready without the proxy", func(ctx context.Context) error {
		// A proxy that does not respond has no connections.
		if f, err := n.proxyMetrics(ctx); err == nil && f.connections > 0 {
			return errors.New("the API server is still connected to the proxy: kubelet has not yet restarted it")
		}
		if err := n.apiReady(ctx, m); err != nil {
			return fmt.Errorf("API server: %w", err)
		}
		return nil
	})
}

// waitProxyRestarted waits until the proxy is ready and is another process than the one that had
// the metrics before, which is nil if no proxy was running. If the metrics lack the start time, the
// proxy must have been unreachable in between.
func (n *Node) waitProxyRestarted(ctx context.Context, before *metrics) error {
	away := before == nil
	return n.poll(ctx, "the proxy was not ready", func(ctx context.Context) error {
		f, err := n.proxyMetrics(ctx)
		if err != nil {
			away = true
			return err
		}
		if !away && f.started == before.started {
			return errors.New("kubelet has not yet restarted the proxy")
		}
		return n.proxyReady(ctx)
	})
}

// waitProxyStopped waits until no proxy answers: its ports are free then.
func (n *Node) waitProxyStopped(ctx context.Context) error {
	return n.poll(ctx, "the proxy was not stopped", func(ctx context.Context) error {
		if _, err := n.proxyMetrics(ctx); err == nil {
			return errors.New("it still responds at " + n.Settings.Admin)
		}
		return nil
	})
}

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
)

const (
	pollEvery   = 500 * time.Millisecond
	pollTimeout = 5 * time.Second
	// steady is how many polls in a row must find what is waited for: an API server that kubelet is
	// about to stop is ready, too.
	steady = 4
)

// until polls until check has returned nil several times in a row. Otherwise its error is what did not
// happen, with the last error of check.
func (n *Node) until(ctx context.Context, not string, check func(context.Context) error) error {
	deadline, cancel := context.WithTimeout(ctx, n.Timeout)
	defer cancel()
	last := errors.New("nothing was seen")
	for good := 0; ; {
		one, done := context.WithTimeout(deadline, pollTimeout)
		err := check(one)
		done()
		if err == nil {
			if good++; good == steady {
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
				return fmt.Errorf("interrupted while %s", not)
			}
			return fmt.Errorf("%s within %v: %w", not, n.Timeout, last)
		case <-time.After(pollEvery):
		}
	}
}

const maxBody = 4 << 20 // bytes; metrics are the largest

// get returns the body of a GET. An answer other than 200 is an error with what it says.
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
		return nil, fmt.Errorf("%s: %s%s", url, res.Status, failing(string(body)))
	}
	return body, nil
}

// failing returns the checks of a /readyz that fail.
func failing(body string) string {
	var bad []string
	for line := range strings.Lines(body) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "[-]") {
			bad = append(bad, line)
		}
	}
	if len(bad) == 0 {
		return ""
	}
	return ": " + strings.Join(bad, ", ")
}

// httpClient is a client that no environment sends elsewhere.
func httpClient(t *tls.Config) *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: t, DisableKeepAlives: true}}
}

// proxyReady returns why the proxy on this node is not ready, or nil. The proxy calls itself ready
// when it serves anything; here its KMS and its rules have to be well, too. Its other checks are about
// other proxies, and about what clients have written.
func (n *Node) proxyReady(ctx context.Context) error {
	body, err := get(ctx, httpClient(nil), "http://"+n.Settings.Admin+"/readyz")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "[-]kms ") || strings.HasPrefix(line, "[-]rule ") {
			return fmt.Errorf("proxy: %s", strings.TrimSpace(line))
		}
	}
	return nil
}

// figures are those of the proxy's metrics that matter here.
type figures struct {
	connections int
	started     float64 // Unix time of the process, 0 if unknown
}

func (n *Node) proxyFigures(ctx context.Context) (*figures, error) {
	body, err := get(ctx, httpClient(nil), "http://"+n.Settings.Admin+"/metrics")
	if err != nil {
		return nil, err
	}
	f := new(figures)
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
	// Where anonymous requests are off, the API server wants to know who asks.
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

// through waits until the API server is ready and uses the proxy.
func (n *Node) through(ctx context.Context, m *Manifest) error {
	return n.until(ctx, "the API server was not ready and connected to the proxy", func(ctx context.Context) error {
		if err := n.apiReady(ctx, m); err != nil {
			return fmt.Errorf("API server: %w", err)
		}
		f, err := n.proxyFigures(ctx)
		if err != nil {
			return fmt.Errorf("proxy: %w", err)
		}
		if f.connections == 0 {
			return errors.New("nothing is connected to the proxy: kubelet has not restarted the API server yet")
		}
		return nil
	})
}

// past waits until the API server is ready and does not use the proxy.
func (n *Node) past(ctx context.Context, m *Manifest) error {
	return n.until(ctx, "the API server was not ready without the proxy", func(ctx context.Context) error {
		// A proxy that does not answer has no connections.
		if f, err := n.proxyFigures(ctx); err == nil && f.connections > 0 {
			return errors.New("the API server is connected to the proxy: kubelet has not restarted it yet")
		}
		if err := n.apiReady(ctx, m); err != nil {
			return fmt.Errorf("API server: %w", err)
		}
		return nil
	})
}

// restarted waits until the proxy is ready, and is not the process of before, whose figures are nil if
// there was none. Where the metrics do not tell when a process was started, the proxy must have been
// away meanwhile.
func (n *Node) restarted(ctx context.Context, before *figures) error {
	away := before == nil
	return n.until(ctx, "the proxy was not ready", func(ctx context.Context) error {
		f, err := n.proxyFigures(ctx)
		if err != nil {
			away = true
			return err
		}
		if !away && f.started == before.started {
			return errors.New("kubelet has not restarted the proxy yet")
		}
		return n.proxyReady(ctx)
	})
}

// gone waits until no proxy answers: its ports are free then.
func (n *Node) gone(ctx context.Context) error {
	return n.until(ctx, "the proxy was not stopped", func(ctx context.Context) error {
		if _, err := n.proxyFigures(ctx); err == nil {
			return errors.New("it still answers at " + n.Settings.Admin)
		}
		return nil
	})
}

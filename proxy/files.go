package proxy

import (
	"context"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
)

// filesInterval is how often TLS files are checked without a connection that needs them.
const filesInterval = time.Second

// tlsFiles are the files of all listeners and of the connections to etcd.
func (p *Proxy) tlsFiles() []*tlsfiles.Files {
	var all []*tlsfiles.Files
	for _, l := range p.listeners {
		if l.TLS != nil {
			all = append(all, l.TLS)
		}
	}
	// Each upstream reads the same files.
	if c := p.upstream.HTTP.Tls; c != nil {
		all = append(all, c.Files)
	}
	return all
}

// watchFiles looks at the TLS files until ctx ends, so that ones that cannot be used are reported
// before a connection would need them.
func (p *Proxy) watchFiles(ctx context.Context) {
	files := p.tlsFiles()
	if len(files) == 0 {
		return
	}
	ticker := time.NewTicker(filesInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, f := range files {
				f.Get()
			}
		}
	}
}

// fileChecks are the lines of the readiness report about TLS files.
func (p *Proxy) fileChecks() []readiness.Check {
	var checks []readiness.Check
	for _, f := range p.tlsFiles() {
		c := readiness.Check{Name: "TLS files of " + f.What(), OK: true}
		if err := f.Problem(); err != nil {
			c.OK, c.Detail = false, "the old ones stay in use: "+err.Error()
		}
		checks = append(checks, c)
	}
	return checks
}

package gateway

import (
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// etcdProxy forwards a request to etcd, whatever its method. It does not forward the request's
// body, because etcd reads none on these paths. It removes header fields of the response that let
// scripts of other origins read it.
func etcdProxy() http.Handler {
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: "etcd"})
			r.Out.Host = r.In.Host
			r.Out.Body, r.Out.ContentLength = http.NoBody, 0
			r.Out.Header.Del("Expect")
		},
		ModifyResponse: func(r *http.Response) error {
			for name := range r.Header {
				if strings.HasPrefix(name, "Access-Control-") {
					delete(r.Header, name)
				}
			}
			return nil
		},
		Transport: connTransport{}, ErrorLog: log.New(io.Discard, "", 0),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			text := "etcd is unreachable"
			if id := listener.IdentityOf(r.Context()); id != nil {
				text = id.Upstream.HTTP.Explain(r.Context(), err)
			}
			http.Error(w, rpc.TextPrefix+text, http.StatusBadGateway)
		},
	}
}

// connTransport goes where the listener of a request's connection leads to.
type connTransport struct{}

// RoundTrip implements http.RoundTripper.
func (connTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	id := listener.IdentityOf(r.Context())
	if id == nil {
		return nil, etcdapi.ErrNoIdentity
	}
	return id.Upstream.HTTP.RoundTrip(r)
}

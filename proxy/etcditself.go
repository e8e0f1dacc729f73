package proxy

import (
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
)

// etcdItself has etcd respond to a request, whatever its method. The request's body stays behind:
// etcd reads none on these paths. Header fields that let scripts of other origins read the response
// stay behind, too.
func etcdItself() http.Handler {
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
		Transport: ofConnection{}, ErrorLog: log.New(io.Discard, "", 0),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			text := "etcd is unreachable"
			if id := identityOf(r.Context()); id != nil {
				text = id.to.http.explain(r.Context(), err)
			}
			http.Error(w, ownPrefix+text, http.StatusBadGateway)
		},
	}
}

// ofConnection goes where the listener of a request's connection leads to.
type ofConnection struct{}

// RoundTrip implements http.RoundTripper.
func (ofConnection) RoundTrip(r *http.Request) (*http.Response, error) {
	id := identityOf(r.Context())
	if id == nil {
		return nil, errNoIdentity
	}
	return id.to.http.RoundTrip(r)
}

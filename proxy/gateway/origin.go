package gateway

import (
	"encoding/json"
	"mime"
	"net/http"
	"net/url"
	"strings"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// crossOrigin reports whether a browser sent r for a page of another origin.
func crossOrigin(r *http.Request) bool {
	for _, origin := range r.Header.Values("Origin") {
		if u, err := url.Parse(origin); err != nil || u.Host == "" || !strings.EqualFold(u.Host, r.Host) {
			return true
		}
	}
	if (r.Method == http.MethodGet || r.Method == http.MethodHead) && !websocket.IsWebSocketUpgrade(r) {
		return false // a page cannot read the response without an Origin
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "none", "same-origin":
		return false
	}
	return true
}

// mayBeCrossOrigin reports whether r is a request that a browser might have sent for a page of
// another origin without saying so, as old ones do. Such a page can choose only content types of
// forms.
func mayBeCrossOrigin(r *http.Request) bool {
	agent := r.Header.Get("User-Agent")
	// as all browsers say of themselves
	if !strings.HasPrefix(agent, "Mozilla/") && !strings.HasPrefix(agent, "Opera/") {
		return false
	}
	if r.Method != http.MethodPost || r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" {
		return false
	}
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return err != nil || kind != "application/json"
}

// refuse says why r is refused, in the style of the path that was requested.
func refuse(w http.ResponseWriter, r *http.Request, status int, code codes.Code, text string) {
	text = rpc.TextPrefix + text
	if !isGateway(r.URL.Path) {
		http.Error(w, text, status)
		return
	}
	writeStatus(w, status, code, text)
}

// writeStatus writes a status as the gateway does.
func writeStatus(w http.ResponseWriter, httpStatus int, code codes.Code, text string) {
	// it has nothing that fails
	body, _ := json.Marshal(map[string]any{"code": code, "message": text, "details": []any{}})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(httpStatus)
	_, _ = w.Write(body) // the client may have left
}

func isGateway(path string) bool { return strings.HasPrefix(path, "/v3/") }

const (
	misdirected = "the request's Host is none of the listener's: use a loopback name, an IP address, a name of the listener's certificate, " +
		"or the host of one of its advertiseClientURLs"
	foreignPage = "requests of web pages of another origin are refused"
	formContent = "a browser's request needs Content-Type: application/json"
)

// guardOrigin refuses the requests that the listener's policy does not accept, and answers OPTIONS
// as etcd does, but without letting scripts of other origins in.
func guardOrigin(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		policy := policyOf(r)
		switch {
		case !policy.Allows(r.Host):
			refuse(w, r, http.StatusMisdirectedRequest, codes.PermissionDenied, misdirected)
		case crossOrigin(r):
			refuse(w, r, http.StatusForbidden, codes.PermissionDenied, foreignPage)
		case isGateway(r.URL.Path) && mayBeCrossOrigin(r):
			refuse(w, r, http.StatusUnsupportedMediaType, codes.InvalidArgument, formContent)
		case r.Method == http.MethodOptions:
			w.WriteHeader(http.StatusOK)
		case isGateway(r.URL.Path) && policy != nil && policy.NoGateway:
			http.NotFound(w, r)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// policyOf returns the policy of the listener that r came over, nil if it came over none.
func policyOf(r *http.Request) *listener.HostPolicy {
	if id := listener.IdentityOf(r.Context()); id != nil {
		return id.HostPolicy
	}
	return nil
}

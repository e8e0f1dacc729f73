package gateway

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
)

// TestGatewayOfBeta: etcd's older name of /v3/ is one here, and hides nothing from what looks at
// the path.
func TestGatewayOfBeta(t *testing.T) {
	var seen []string
	h := acceptBeta(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen = append(seen, r.URL.RequestURI()) }))
	for _, path := range []string{"/v3beta/kv/range?a=b", "/v3/kv/range", "/v3beta", "/v3beta/", "/v3alpha/kv/range", "/x/v3beta/"} {
		r := httptest.NewRequest(http.MethodPost, path, nil)
		if h.ServeHTTP(httptest.NewRecorder(), r); r.URL.RequestURI() != path {
			t.Errorf("%s: the request itself was changed", path)
		}
	}
	if want := []string{"/v3/kv/range?a=b", "/v3/kv/range", "/v3beta", "/v3/", "/v3alpha/kv/range", "/x/v3beta/"}; !slices.Equal(seen, want) {
		t.Errorf("%q", seen)
	}
}

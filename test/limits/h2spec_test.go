package limits

import (
	"encoding/xml"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// h2specCases are what h2spec runs: all of it but http2/5.1.2. There it opens one stream more than
// a server allows, which with etcd's 4294967295 over TLS takes all memory of the machine.
func h2specCases() []string {
	all := []string{"generic", "hpack", "http2/3", "http2/4", "http2/5.1.1", "http2/5.3", "http2/5.4", "http2/5.5", "http2/6", "http2/7", "http2/8"}
	for i := range 13 {
		all = append(all, fmt.Sprintf("http2/5.1/%d", i+1))
	}
	return all
}

// knownFailure is a case of h2spec that the proxy may fail.
type knownFailure struct {
	reason string
	chance bool // it fails or not as the answer comes before or after the rest of the request
	clear  bool // only without TLS
}

// The reasons. docs/design/compatibility.md tells them, too.
const (
	noBody   = "a request that is not gRPC is answered without a body, as by etcd without TLS"
	asGRPC   = "grpc-go does not check it, and so etcd without TLS serves such calls"
	early    = "a request that is not gRPC is answered and its stream closed before its data comes"
	asHTTP1  = "it is taken for HTTP/1, answered by 400, and closed"
	headers  = "http2/8.1.2.3: "
	lengthOf = "http2/8.1.2.6: Sends a HEADERS frame with the \"content-length\" header field which does not equal the "
)

// knownFailures are by section and title.
var knownFailures = map[string]knownFailure{
	"generic/2: Sends a WINDOW_UPDATE frame on half-closed (remote) stream":                                           {reason: noBody},
	"generic/2: Sends a PRIORITY frame on half-closed (remote) stream":                                                {reason: noBody},
	"http2/3.5: Sends invalid connection preface":                                                                     {reason: asHTTP1, clear: true},
	"http2/6.9.1: Sends multiple WINDOW_UPDATE frames increasing the flow control window to above 2^31-1 on a stream": {reason: early, chance: true},
	"http2/8.1.2.2: Sends a HEADERS frame that contains the TE header field with any value other than \"trailers\"":   {reason: asGRPC, clear: true},
	headers + "Sends a HEADERS frame with empty \":path\" pseudo-header field":                                        {reason: asGRPC, clear: true},
	headers + "Sends a HEADERS frame that omits \":method\" pseudo-header field":                                      {reason: asGRPC, clear: true},
	headers + "Sends a HEADERS frame that omits \":scheme\" pseudo-header field":                                      {reason: asGRPC, clear: true},
	headers + "Sends a HEADERS frame that omits \":path\" pseudo-header field":                                        {reason: asGRPC, clear: true},
	lengthOf + "DATA frame payload length":                                                                            {reason: asGRPC + "; with TLS: " + early, chance: true},
	lengthOf + "sum of the multiple DATA frames payload length":                                                       {reason: asGRPC + "; with TLS: " + early, chance: true},
}

// h2spec runs the cases against a server and returns those that fail, with what the server did.
func h2spec(t *testing.T, bin, address string, overTLS bool) (failed map[string]string, err error) {
	t.Helper()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	report := filepath.Join(t.TempDir(), "report.xml")
	args := append(h2specCases(), "--host", host, "--port", port, "--junit-report", report)
	if overTLS {
		args = append(args, "--tls", "--insecure")
	}
	output, err := exec.CommandContext(t.Context(), bin, args...).CombinedOutput()
	data, unread := os.ReadFile(report)
	if unread != nil { // else it exits 1 for cases that fail
		return nil, fmt.Errorf("h2spec: %w\n%s", err, output)
	}
	var suites struct {
		Suites []struct {
			Cases []struct {
				Section string  `xml:"package,attr"`
				Title   string  `xml:"classname,attr"`
				Error   *string `xml:"error"`
				Failure *string `xml:"failure"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(data, &suites); err != nil {
		return nil, fmt.Errorf("h2spec's report: %w", err)
	}
	failed, ran := make(map[string]string), 0
	for _, suite := range suites.Suites {
		for _, c := range suite.Cases {
			ran++
			if c.Error != nil || c.Failure != nil {
				why := c.Error
				if why == nil {
					why = c.Failure
				}
				lines := strings.Split(*why, "\n")
				failed[c.Section+": "+c.Title] = lines[len(lines)-1]
			}
		}
	}
	if ran < 140 {
		return nil, fmt.Errorf("h2spec ran %d cases", ran)
	}
	return failed, nil
}

// TestH2Spec: of the cases of h2spec the proxy fails none that is not known, and fewer than etcd,
// not counting those that fail by chance.
func TestH2Spec(t *testing.T) {
	t.Parallel()
	bin := harness.Bin(t, "h2spec")
	for _, w := range transports(t) {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			var etcd, proxy map[string]string
			var etcdErr, proxyErr error
			var both sync.WaitGroup
			both.Go(func() { etcd, etcdErr = h2spec(t, bin, w.etcd, w.tls != nil) })
			both.Go(func() { proxy, proxyErr = h2spec(t, bin, w.proxies["the proxy"], w.tls != nil) })
			both.Wait()
			if etcdErr != nil || proxyErr != nil {
				t.Fatalf("etcd: %v; the proxy: %v", etcdErr, proxyErr)
			}
			for name, why := range proxy {
				if known, ok := knownFailures[name]; !ok || known.clear && w.tls != nil {
					t.Errorf("the proxy fails %s (%s)", name, why)
				}
			}
			byChance := func(name, _ string) bool { return knownFailures[name].chance }
			t.Logf("etcd fails %d cases, the proxy %d: %q", len(etcd), len(proxy), slices.Sorted(maps.Keys(proxy)))
			maps.DeleteFunc(etcd, byChance)
			maps.DeleteFunc(proxy, byChance)
			if len(proxy) >= len(etcd) {
				t.Errorf("the proxy fails %d cases, and etcd %d: %q", len(proxy), len(etcd), slices.Sorted(maps.Keys(etcd)))
			}
		})
	}
}

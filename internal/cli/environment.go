package cli

import (
	"errors"
	"os"
	"strings"
)

// refuseEnvironment refuses variables of the environment that make a library print the traffic:
// GODEBUG=http2debug=1 and 2, by which Go's HTTP/2 packages print every header, tokens among them,
// and every frame with its data. The Alibaba Cloud SDK's DEBUG=sdk is refused where that KMS is
// configured. Others print nothing here: GRPC_GO_LOG_SEVERITY_LEVEL, GRPC_GO_LOG_VERBOSITY_LEVEL
// and ETCD_CLIENT_DEBUG go to a logger that main replaces, and the logs of GRPC_BINARY_LOG_FILTER
// to a sink that discards them.
func refuseEnvironment() error {
	// The packages look for these substrings, so "http2debug=10" is the first.
	for _, setting := range []string{"http2debug=1", "http2debug=2"} {
		if strings.Contains(os.Getenv("GODEBUG"), setting) {
			return &failure{code: exitFailure, err: errors.New("the environment has GODEBUG=" + setting + ", which makes Go print tokens and values"), hint: "unset it"}
		}
	}
	return nil
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

// maxReadyReport bounds what is read of a /readyz response, in bytes.
const maxReadyReport = 1 << 20

func newHealthcheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "healthcheck",
		Short: "ask a running proxy whether it is ready",
		Long: `healthcheck asks /readyz of the proxy on this machine, at the admin address of its configuration. It is the health check of the container image,
which has no shell and no HTTP client. It prints the checks that failed and is silent if there are none.

A proxy stays ready while a KMS or etcd is down, because it serves the rest; the failed check is printed and the exit code is 0.

Exit codes:
  0  the proxy is ready
  1  the proxy answers, and is not ready
  3  no answer`,
		Args: cobra.NoArgs,
	}
	path := configFlag(cmd)
	address := cmd.Flags().String("address", "", "`HOST:PORT` of the admin server, in place of the configuration's")
	timeout := cmd.Flags().Duration("timeout", 3*time.Second, "how long to wait for the answer")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		if *timeout <= 0 {
			return &failure{code: exitUsage, err: fmt.Errorf("--timeout %v is not more than 0s", *timeout)}
		}
		at := *address
		if at == "" {
			var err error
			at, err = config.AdminAddress(*path)
			if errors.Is(err, config.ErrNoAdmin) {
				return &failure{code: exitFailure, err: err, hint: "add `admin: {address: 127.0.0.1:9379}` to " + *path + ", or name the address with --address"}
			}
			if _, unreadable := errors.AsType[*fs.PathError](err); unreadable {
				return unread(err)
			}
			if err != nil {
				return &failure{code: exitFailure, err: err, hint: "name the address with --address"}
			}
		} else if _, _, err := net.SplitHostPort(at); err != nil {
			return &failure{code: exitUsage, err: fmt.Errorf("--address %q is not host:port", at)}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), *timeout)
		defer cancel()
		return healthcheck(ctx, cmd.OutOrStdout(), at)
	})
	return cmd
}

// healthcheck asks the admin server at address and writes the failed checks to w.
func healthcheck(ctx context.Context, w io.Writer, address string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", http.NoBody)
	if err != nil {
		return err
	}
	// A transport of its own: the proxy that HTTP_PROXY names knows nothing of this machine's ports.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%s did not answer in time", req.URL)
		}
		return &failure{code: exitFailure, err: err, hint: "the proxy's own log says why it does not serve; its admin.address must be the one that is asked here"}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxReadyReport))
	if err != nil {
		return &failure{code: exitFailure, err: fmt.Errorf("read %s: %w", req.URL, err)}
	}
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "[-]") {
			printf(w, "%s\n", strings.TrimRight(line, "\n"))
		}
	}
	switch res.StatusCode {
	case http.StatusOK:
		return nil
	case http.StatusServiceUnavailable:
		return &failure{code: exitFindings, err: errors.New("the proxy is not ready: it starts or drains")}
	default:
		return &failure{code: exitFailure, err: fmt.Errorf("%s answers %s, as no proxy does", req.URL, res.Status), hint: "another server has the proxy's admin.address"}
	}
}

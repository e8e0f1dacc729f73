package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
)

// maxReadyReport bounds what is read of a /readyz response, in bytes.
const maxReadyReport = 1 << 20

func newHealthcheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "healthcheck",
		Short: "check whether a running proxy is ready",
		Long: `healthcheck requests /readyz from the proxy on this machine, at the admin address of its
configuration. It is the health check of the container image, which has no shell and no HTTP client.
It prints the checks that failed, and nothing if there are none.

A proxy stays ready while a KMS or etcd is down, because it serves the rest: the failed check is
printed and the exit code is 0.`,
		Args: command.NoArgs,
	}
	path := command.ConfigFlag(cmd)
	address := cmd.Flags().String("address", "", "`HOST:PORT` of the admin server, instead of the address in the configuration")
	timeout := cmd.Flags().Duration("timeout", 3*time.Second, "how long to wait for the response")
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		if err := command.Positive("--timeout", *timeout); err != nil {
			return err
		}
		at := *address
		if at == "" {
			var err error
			at, err = config.AdminAddress(*path)
			if errors.Is(err, config.ErrNoAdmin) {
				return problem.WithHint(err, "add `admin: {address: 127.0.0.1:9379}` to "+*path+", or name the address with --address")
			}
			if _, unreadable := errors.AsType[*fs.PathError](err); unreadable {
				return command.Unreadable(err)
			}
			if err != nil {
				return problem.WithHint(err, "name the address with --address")
			}
		} else if _, _, err := net.SplitHostPort(at); err != nil {
			return command.Usage("", "--address %q is not host:port", at)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), *timeout)
		defer cancel()
		return healthcheck(ctx, cmd.OutOrStdout(), at)
	})
	return cmd
}

// healthcheck requests /readyz from the admin server at address and writes the failed checks to w.
func healthcheck(ctx context.Context, w io.Writer, address string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", http.NoBody)
	if err != nil {
		return err
	}
	// Not the default transport: the HTTP proxy of HTTP_PROXY does not reach the ports of this
	// machine.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%s did not respond in time", req.URL)
		}
		return problem.WithHint(err, "see the log of the proxy; its admin.address must be this address")
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxReadyReport))
	if err != nil {
		return problem.New("", "read %s: %w", req.URL, err)
	}
	for _, line := range readiness.Failed(string(body)) {
		printable.Fprintf(w, "%s\n", line)
	}
	switch res.StatusCode {
	case http.StatusOK:
		return nil
	case http.StatusServiceUnavailable:
		return command.Findings("", "the proxy is not ready: it is starting or draining")
	default:
		return problem.New("another server has the proxy's admin.address", "%s responds %s, as no proxy does", req.URL, res.Status)
	}
}

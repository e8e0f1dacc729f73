package cli

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/server"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

func newServe() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "run the proxy",
		Long: `serve runs the proxy until SIGTERM or SIGINT. It starts while etcd or the KMS is unreachable, keeps
trying, and serves what it can.

The first SIGTERM or SIGINT begins the drain: the proxy accepts no more connections, finishes
current calls, and ends watches so that their clients reconnect to another proxy. Calls that are
left after --drain-timeout are canceled. A second signal, half a second later or more, exits at
once, with code 3.

SIGHUP, or a change of the file, reloads the rules, the log level, and the allowedClients and
ciphertextClients of listeners. Other changes are logged and need a restart. A reload that would
protect keys less than before is refused without --allow-weakening. SIGHUP also causes a health
check of every KMS at once. A changed local key file causes one of its provider, after which the
proxy encrypts with a new version.

Under systemd, a listener with the address systemd://NAME uses the sockets of a socket unit. The
proxy notifies systemd of readiness, draining and the watchdog (Type=notify, WatchdogSec=).

Logs go to standard error.`,
		Args: command.NoArgs,
	}
	path := command.ConfigFlag(cmd)
	var o server.Options
	f := cmd.Flags()
	f.DurationVar(&o.Drain, "drain-timeout", proxy.DefaultDrainTimeout, "how long current calls may take after the first SIGTERM or SIGINT")
	f.BoolVar(&o.AllowWeakening, "allow-weakening", false, "permit the start and reloads to remove or narrow rules, write plaintext, allow plaintext reads or make encrypted values unreadable")
	f.DurationVar(&o.ScanInterval, "scan-interval", 0, "count the values in etcd at this interval, for metrics; 0s: never. One of the proxies with the flag does it: set it on all")
	renew := f.Bool("reencrypt", false, "re-encrypt the values in etcd, at the start and after each rotation. One of the proxies with the flag does it: set it on all")
	f.DurationVar(&o.ReencryptInterval, "reencrypt-interval", time.Hour, "with --reencrypt, the time between two runs without another reason")
	f.Float64Var(&o.ReencryptRate, "reencrypt-rate", 0, "with --reencrypt, the maximum of values per second; 0: no limit")
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		if err := command.Positive("--drain-timeout", o.Drain); err != nil {
			return err
		}
		if o.ScanInterval < 0 || o.ScanInterval > 0 && o.ScanInterval < time.Second {
			return command.Usage("", "--scan-interval %v is neither 0s nor a second or more", o.ScanInterval)
		}
		if o.ReencryptInterval < time.Second || o.ReencryptRate < 0 {
			return command.Usage("", "--reencrypt-interval must be at least 1s, and --reencrypt-rate at least 0")
		}
		if !*renew {
			o.ReencryptInterval = 0
		}
		load := func(warn func(config.Problem)) (*config.Config, error) {
			return command.LoadConfig(cmd, *path, command.Checks(warn))
		}
		return server.Serve(cmd.Context(), *path, load, cmd.ErrOrStderr(), o)
	})
	return cmd
}

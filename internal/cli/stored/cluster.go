// Package stored has the commands that work on the values in etcd, and on its files: status,
// reencrypt, purge, verify, decrypt and drill. They connect to etcd directly, and use the keys and
// rules of the configuration.
package stored

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/coredump"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/encryption"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/etcdclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/guard"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// cluster is etcd and the rules of the configuration.
type cluster struct {
	config *config.Config
	keys   *encryption.Keys
	etcd   *clientv3.Client // nil with noEtcd
	rules  *inventory.Rules
	log    *slog.Logger
	// files of private keys
	identities []string

	stop func()
	ends sync.WaitGroup // of the rings
}

// clusterOptions are what commands differ in.
type clusterOptions struct {
	inspectOnly bool     // nothing can be encrypted, and no DEK seed is generated
	noEtcd      bool     // the cluster has no client, for commands that read files
	noKMS       bool     // no KMS is called
	identities  []string // files of private keys that decrypt recovery copies
	// providers whose keys are treated as lost. What cannot be used is expected, and not logged
	lost []string
	wait time.Duration // how long to wait for etcd and the KMS
}

// timeoutFlag adds --timeout.
func timeoutFlag(cmd *cobra.Command) *time.Duration {
	return cmd.Flags().Duration("timeout", 30*time.Second, "how long to wait for etcd and for each KMS at the start")
}

// identityFlag adds --identity.
func identityFlag(cmd *cobra.Command) *[]string {
	return command.IdentityFlag(cmd, "which decrypts values with the recovery copies of providers of kind age if the KMS does not decrypt them, even if its key is disabled")
}

// loadCluster is openCluster with the configuration at path.
func loadCluster(cmd *cobra.Command, path string, o clusterOptions) (*cluster, error) {
	c, err := command.LoadConfig(cmd, path, command.Checks(nil))
	if err != nil {
		return nil, err
	}
	return openCluster(cmd, c, o)
}

// openCluster connects to etcd and starts the rings. It waits for etcd, and for the first poll of
// each KMS, which may fail. close must follow.
func openCluster(cmd *cobra.Command, c *config.Config, o clusterOptions) (_ *cluster, err error) {
	if err := command.Positive("--timeout", o.wait); err != nil {
		return nil, err
	}
	if len(c.Rules) == 0 {
		return nil, problem.New("add one under rules", "there are no rules")
	}
	if err := coredump.Forbid(); err != nil {
		return nil, fmt.Errorf("turn off core dumps, which would contain DEK seeds and values: %w", err)
	}
	identities, err := command.ReadIdentities(cmd, c, o.identities)
	if err != nil {
		return nil, err
	}
	// Errors only: what a KMS cannot do is in the report.
	cl := &cluster{config: c, log: printable.NewLogger(cmd.ErrOrStderr(), "text", slog.LevelError), identities: o.identities}
	if len(o.lost) > 0 {
		cl.log = slog.New(slog.DiscardHandler)
	}
	cl.keys, err = encryption.New(encryption.Config{
		Config: c, Identities: identities, InspectOnly: o.inspectOnly, Lost: o.lost, Record: command.NewCallLog(c, cmd.ErrOrStderr()).Record,
		Registry: prometheus.NewRegistry(), Logger: cl.log,
	})
	if err != nil {
		return nil, err
	}
	cl.rules = cl.keys.Rules().Stored()
	running, stop := context.WithCancel(context.Background())
	cl.stop = stop
	defer func() {
		if err != nil {
			cl.close()
		}
	}()
	if !o.noEtcd {
		if cl.etcd, _, err = etcdclient.New(c, cl.log); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), o.wait)
	defer cancel()
	var polls sync.WaitGroup
	defer polls.Wait()
	for _, ring := range cl.keys.Rings() {
		if o.noKMS {
			break
		}
		cl.ends.Go(func() { _ = ring.Run(running) })    // it fails only if it ran before
		polls.Go(func() { _ = ring.WaitForCheck(ctx) }) // its state has the reason
	}
	for _, ring := range cl.keys.Offline() {
		cl.ends.Go(func() { _ = ring.Run(running) })
	}
	if !o.noEtcd {
		if err = cl.reach(ctx, cmd.ErrOrStderr()); err == nil {
			err = etcdclient.CheckNotProxy(ctx, c, cl.log)
		}
	}
	return cl, err
}

// reachNotice is how long etcd may take to respond before the command says what it waits for.
const reachNotice = 2 * time.Second

// reach waits until etcd responds. It prints to stderr that it waits, and why.
func (cl *cluster) reach(ctx context.Context, stderr io.Writer) error {
	endpoints := strings.Join(cl.config.Etcd.Endpoints, ", ")
	first, cancel := context.WithTimeout(ctx, reachNotice)
	defer cancel()
	err := cl.respond(first)
	if err != nil && !errors.Is(err, etcdclient.ErrChained) && ctx.Err() == nil {
		printable.Fprintf(stderr, "waiting for etcd at %s: %v\n", endpoints, err)
		err = cl.respond(ctx)
	}
	if err == nil || errors.Is(err, etcdclient.ErrChained) {
		return err
	}
	return problem.New("check etcd.endpoints and etcd.tls; the command connects to etcd directly, not through the proxy",
		"etcd is unreachable at %s: %w", endpoints, err)
}

// respond waits until etcd responds, with an error or without: whether it permits the command will
// show. The error says why there is no response.
func (cl *cluster) respond(ctx context.Context) error {
	_, err := cl.etcd.Get(ctx, "\x00", clientv3.WithLimit(1), clientv3.WithKeysOnly(), clientv3.WithSerializable())
	if upstream.IsChained(err) {
		return etcdclient.ErrChained
	}
	if code := status.Code(err); code != codes.Unavailable && code != codes.DeadlineExceeded && !errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	// A timeout does not say why.
	why := upstream.WhyUnreachable(context.WithoutCancel(ctx), cl.etcd)
	return errors.New(cmp.Or(why, "it does not respond in time"))
}

// fleet is the proxies of this etcd, for commands that compare their rules.
func (cl *cluster) fleet() *coordination.Fleet {
	f := coordination.NewFleet(coordination.FleetConfig{Client: cl.etcd, Prefix: cl.config.Coordination.Prefix})
	f.SetPolicy(guard.PolicyOf(cl.config.Rules, cl.config.Audit))
	return f
}

// sameRules returns an error if a proxy has other rules.
func (cl *cluster) sameRules(ctx context.Context) error {
	return explainOtherRules(cl.fleet().SameRules(ctx))
}

// explainOtherRules adds a hint to [coordination.ErrOtherRules].
func explainOtherRules(err error) error {
	if errors.Is(err, coordination.ErrOtherRules) {
		return problem.WithHint(err, "give all proxies this configuration first (see status), or use --ignore-proxies")
	}
	return err
}

// close stops the rings and releases all connections.
func (cl *cluster) close() {
	cl.stop()
	cl.ends.Wait()
	if cl.etcd != nil {
		_ = cl.etcd.Close() // it returns the end of its own context
	}
	cl.keys.Close()
}

// CountEncrypted returns how many values of one rule in etcd are encrypted, and its prefix. It is
// the first rule with such values; without any, n is 0.
func CountEncrypted(cmd *cobra.Command, c *config.Config) (n int64, prefix string, err error) {
	cl, err := openCluster(cmd, c, clusterOptions{inspectOnly: true, wait: 30 * time.Second})
	if err != nil {
		return 0, "", err
	}
	defer cl.close()
	counts, _, err := inventory.Survey(cmd.Context(), cl.etcd, cl.rules, nil)
	if err != nil {
		return 0, "", err
	}
	for _, r := range counts {
		encrypted := r.All.Keys
		for _, k := range r.Keys {
			if k.Provider == inventory.Plaintext {
				encrypted -= k.Keys
			}
		}
		if encrypted > 0 {
			return encrypted, r.Prefix, nil
		}
	}
	return 0, "", nil
}

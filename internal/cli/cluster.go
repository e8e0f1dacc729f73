package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/livefiles"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// cluster is etcd itself and the rules of the configuration, for a command that works on what is stored.
type cluster struct {
	config *config.Config
	app    *app             // its rings run; it serves nothing
	etcd   *clientv3.Client // nil with noEtcd
	rules  *inventory.Rules
	log    *slog.Logger

	stop func()
	ends sync.WaitGroup
}

// clusterOptions are what commands differ in.
type clusterOptions struct {
	inspectOnly bool          // nothing can be sealed, and no seed is minted
	noEtcd      bool          // for files: the cluster has no client
	noKMS       bool          // nothing is opened: no KMS is asked
	wait        time.Duration // how long to wait for etcd and the KMS
}

// openCluster connects to etcd and starts the rings. It waits for etcd, and for the first contact with each KMS, and is no worse for one that does not
// answer. close must follow.
func openCluster(cmd *cobra.Command, c *config.Config, o clusterOptions) (*cluster, error) {
	if o.wait <= 0 {
		return nil, &failure{code: exitUsage, err: fmt.Errorf("--timeout %v is not more than 0s", o.wait)}
	}
	if len(c.Rules) == 0 {
		return nil, &failure{code: exitFailure, err: errors.New("there are no rules"), hint: "add one under rules"}
	}
	if err := forbidDumps(); err != nil {
		return nil, fmt.Errorf("turn off core dumps, which would hold seeds and values: %w", err)
	}
	level := new(slog.LevelVar)
	level.Set(slog.LevelError) // what a KMS does not do is in the report
	cl := &cluster{config: c, log: newLogger(cmd.ErrOrStderr(), "text", level)}
	cl.app = &app{log: cl.log, inspectOnly: o.inspectOnly, calls: newCallLog(c, cmd.ErrOrStderr())}
	set, err := cl.app.assembleKeys(c)
	if err != nil {
		cl.app.close()
		return nil, err
	}
	cl.rules = set.lifecycle
	if !o.noEtcd {
		password, err := etcdPassword(c, cl.log)
		if err == nil {
			cl.etcd, err = etcdClient(c, password, cl.log)
		}
		if err != nil {
			cl.app.close()
			return nil, err
		}
	}
	running, stop := context.WithCancel(context.Background())
	cl.stop = stop
	ctx, cancel := context.WithTimeout(cmd.Context(), o.wait)
	defer cancel()
	var contacts sync.WaitGroup
	for _, ring := range cl.app.rings {
		if o.noKMS {
			break
		}
		cl.ends.Go(func() { _ = ring.Run(running) })       // it fails only if it ran before
		contacts.Go(func() { _ = ring.WaitForCheck(ctx) }) // its state says why not
	}
	if !o.noEtcd {
		err = cl.reach(ctx)
		if err == nil {
			err = leadsToProxy(ctx, c, cl.log)
		}
	}
	contacts.Wait()
	if err != nil {
		cl.close()
		return nil, err
	}
	return cl, nil
}

// reach waits until etcd answers.
func (cl *cluster) reach(ctx context.Context) error {
	_, err := cl.etcd.Get(ctx, "\x00", clientv3.WithLimit(1), clientv3.WithKeysOnly(), clientv3.WithSerializable())
	if proxy.IsChained(err) {
		return chained()
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
	default:
		if !errors.Is(err, context.DeadlineExceeded) {
			return nil // it answered; whether it allows what the command does will show
		}
	}
	// That the time is over does not say why.
	if why := proxy.WhyUnreachable(context.WithoutCancel(ctx), cl.etcd); why != "" {
		err = errors.New(why)
	}
	return &failure{
		code: exitFailure, err: fmt.Errorf("etcd is unreachable at %s: %w", strings.Join(cl.config.Etcd.Endpoints, ", "), err),
		hint: "check etcd.endpoints and etcd.tls; the command talks to etcd itself, past the proxy",
	}
}

// fleet is the proxies before this etcd, for a command that asks what rules they have.
func (cl *cluster) fleet() *coordination.Fleet {
	f := coordination.NewFleet(coordination.FleetConfig{Client: cl.etcd, Prefix: cl.config.Coordination.Prefix})
	f.SetPolicy(policyOf(cl.config.Rules, cl.config.Audit))
	return f
}

// chained is the failure of whatever has a proxy for etcd.
func chained() error {
	return &failure{
		code: exitFailure, err: errors.New("etcd.endpoints leads to a proxy, which would seal and open on its own"),
		hint: "name etcd itself under etcd.endpoints",
	}
}

// leadsToProxy returns a failure if an endpoint of etcd leads to a proxy, also through a server between them that drops the mark of a proxy's requests. That etcd does
// not answer is no failure of this kind.
func leadsToProxy(ctx context.Context, c *config.Config, log *slog.Logger) error {
	endpoint, err := proxy.FindProxy(ctx, upstreamConfig(&c.Etcd), log)
	if err == nil && endpoint != "" {
		err = chained()
	}
	return err
}

// close ends the rings and lets everything go.
func (cl *cluster) close() {
	cl.stop()
	cl.ends.Wait()
	if cl.etcd != nil {
		_ = cl.etcd.Close() // it reports the end of its own context
	}
	cl.app.close()
}

// etcdClient makes a client of etcd for requests of the proxy's own.
// password is that of its user, nil without one.
func etcdClient(c *config.Config, password *livefiles.Files[string], log *slog.Logger) (*clientv3.Client, error) {
	u := upstreamConfig(&c.Etcd)
	if password != nil {
		u.Username, u.Password = c.Etcd.Username, password.Get
	}
	return proxy.NewClient(u, log)
}

// etcdPassword reads the password of the user for the proxy's own requests; nil without one.
func etcdPassword(c *config.Config, log *slog.Logger) (*livefiles.Files[string], error) {
	if c.Etcd.Username == "" {
		return nil, nil
	}
	return newPassword(c.Etcd.PasswordFile, log)
}

// upstreamConfig says where etcd is, as the proxy takes it.
func upstreamConfig(e *config.Etcd) proxy.UpstreamConfig {
	u := proxy.UpstreamConfig{Endpoints: e.Endpoints, HTTPEndpoints: e.HTTPEndpoints}
	if t := e.TLS; t != nil {
		u.TLS = &proxy.UpstreamTLS{
			CAFile: t.CAFile, CertFile: t.CertFile, KeyFile: t.KeyFile, ServerName: t.ServerName, InsecureSkipVerify: t.InsecureSkipVerify,
		}
	}
	return u
}

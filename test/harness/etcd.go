package harness

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// EtcdConfig says which etcd to start. The zero value is a 3.7 without TLS whose files must not
// contain a value under a rule.
type EtcdConfig struct {
	// Version is the minor version, one of [Versions]; 3.7 by default.
	Version string
	// Bare marks an etcd that clients use without the proxy: its files may contain anything.
	Bare bool
	// MaxRequestBytes is etcd's own limit; 0 is its default of 1.5 MiB.
	MaxRequestBytes int
	// CA makes etcd serve TLS and require client certificates of this CA.
	CA *CA
	// Name is the prefix of the log's name; "etcd" by default.
	Name string
	// Address is the client address; a free address if empty.
	Address string
	// Relayed puts a [Relay] in front of the peer address of each member of a cluster.
	Relayed bool
	// Restored is a data directory that `etcdutl snapshot restore` made without further flags.
	// Empty is a new one.
	Restored string
	// Flags are appended to the command line.
	Flags []string
}

// Etcd is a running single-member etcd.
type Etcd struct {
	*Process
	env          *Env
	name, member string
	bin          string
	args         []string
	// Address is host:port.
	Address string
	// URL is the endpoint with its scheme.
	URL     string
	DataDir string
	// TLS is for clients; nil without TLS.
	TLS *tls.Config
	// Client is the client certificate for programs; empty without TLS.
	Client Pair
}

// Versions are the minor versions of etcd that a test can start. Version 3.4 is not built from Go
// modules but is part of a package of Debian 12. If it is missing, it is left out, and a line in
// the log says so; in CI it must exist.
func Versions(tb testing.TB) []string {
	tb.Helper()
	newer := []string{"3.5", "3.6", "3.7", "3.8"}
	if _, err := os.Stat(filepath.Join(BinDir(tb), "etcd-3.4")); err != nil && os.Getenv("CI") == "" {
		tb.Logf("without etcd 3.4: `make tools-etcd-3.4` takes it from Debian's package (%v)", err)
		return newer
	}
	return append([]string{"3.4"}, newer...)
}

// StartEtcd starts an etcd with a new data folder and checks that it is the one that responds, by
// its unique member name. Every etcd started here has the same cluster and member IDs, so that
// complete responses of two of them can be compared.
func (e *Env) StartEtcd(cfg EtcdConfig) *Etcd {
	e.TB.Helper()
	if cfg.Version == "" {
		cfg.Version = "3.7"
	}
	if cfg.Name == "" {
		cfg.Name = "etcd"
	}
	member := fmt.Sprintf("%s-%016x", cfg.Name, rand.Uint64())
	dataDir := filepath.Join(e.Dir, member)
	if cfg.Restored != "" {
		member, dataDir = "default", cfg.Restored
	}
	s := &Etcd{env: e, name: cfg.Name, member: member, bin: Bin(e.TB, "etcd-"+cfg.Version), Address: cfg.Address, DataDir: dataDir}
	if s.Address == "" {
		s.Address = FreeAddress(e.TB)
	}
	s.URL = "http://" + s.Address
	args := []string{
		"--name", member, "--data-dir", s.DataDir, "--log-level", "info", "--logger", "zap",
		// etcd derives a member's ID from its advertised peer URL; a single member never connects
		// to it.
		"--listen-peer-urls", "http://" + FreeAddress(e.TB), "--initial-advertise-peer-urls", "http://127.0.0.1:1",
		"--initial-cluster", member + "=http://127.0.0.1:1",
		"--max-wals", "0", // the complete log is kept for the search for secrets
	}
	if cfg.Version != "3.4" {
		args = append(args, "--unsafe-no-fsync") // crashes of the machine are not tested
	}
	if cfg.MaxRequestBytes > 0 {
		args = append(args, "--max-request-bytes", fmt.Sprint(cfg.MaxRequestBytes))
	}
	if cfg.CA != nil {
		s.URL = "https://" + s.Address
		server := cfg.CA.Server(cfg.Name)
		// No common name: otherwise etcd would treat every client of the proxy as the proxy's user.
		s.Client = cfg.CA.Client(cfg.Name+"-client", "")
		s.TLS = cfg.CA.ClientTLS(s.Client)
		args = append(args, "--cert-file", server.CertFile, "--key-file", server.KeyFile, "--trusted-ca-file", cfg.CA.File, "--client-cert-auth")
	}
	args = append(args, "--listen-client-urls", s.URL, "--advertise-client-urls", s.URL)
	args = append(args, cfg.Flags...)
	if !cfg.Bare {
		e.addDataDir(s.DataDir)
	}
	s.args = args
	e.TB.Cleanup(func() {
		if s.Process != nil {
			s.Stop(10 * time.Second)
		}
	})
	s.Start()
	return s
}

// Start starts the etcd again on its data, after [Process.Kill] or [Process.Stop], and waits until
// it responds.
func (s *Etcd) Start() {
	e := s.env
	e.TB.Helper()
	s.Process = e.spawn(s.name, s.bin, s.args...)
	conn := Dial(e.TB, s.Address, s.TLS)
	defer conn.Close()
	Eventually(e.TB, 60*time.Second, s.name+" to answer", func() error {
		if err := s.Alive(); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		members, err := pb.NewClusterClient(conn).MemberList(ctx, &pb.MemberListRequest{})
		if anonymous(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(members.Members) != 1 || members.Members[0].Name != s.member {
			return fmt.Errorf("member list is %v, want only %s: another etcd answers: %w", members.Members, s.member, ErrStop)
		}
		if _, err = pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("\x00"), CountOnly: true}); anonymous(err) {
			return nil
		}
		return err
	})
}

// anonymous reports whether err is the error for a call without a user of an etcd whose
// authentication was turned on by a test.
func anonymous(err error) bool { return errors.Is(rpctypes.Error(err), rpctypes.ErrUserEmpty) }

// Snapshot saves the database to a file in the temporary folder, as etcdctl does, with its checksum
// at the end. It returns the path.
func (s *Etcd) Snapshot(name string) string {
	tb := s.env.TB
	tb.Helper()
	conn := Dial(tb, s.Address, s.TLS)
	defer conn.Close()
	stream, err := pb.NewMaintenanceClient(conn).Snapshot(tb.Context(), &pb.SnapshotRequest{})
	var data []byte
	for err == nil {
		var r *pb.SnapshotResponse
		if r, err = stream.Recv(); err == nil {
			data = append(data, r.Blob...)
		}
	}
	if !errors.Is(err, io.EOF) {
		tb.Fatalf("save a snapshot: %v", err)
	}
	if err := os.MkdirAll(filepath.Dir(filepath.Join(s.env.Dir, name)), 0o700); err != nil {
		tb.Fatal(err)
	}
	return s.env.File(name, data)
}

// Dial opens a raw gRPC connection (no retries, no limit on responses) that is closed at the end of
// the test. target is host:port or unix:///path.
func Dial(tb interface {
	Helper()
	Fatalf(string, ...any)
	Cleanup(func())
}, target string, config *tls.Config, opts ...grpc.DialOption) *grpc.ClientConn {
	tb.Helper()
	transport := insecure.NewCredentials()
	if config != nil {
		transport = credentials.NewTLS(config)
	}
	conn, err := grpc.NewClient(target, append(append(SearchErrors(),
		grpc.WithTransportCredentials(transport),
		grpc.WithDisableRetry(),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 5 * time.Second,
			Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30), grpc.MaxCallSendMsgSize(1<<30), grpc.WaitForReady(true))), opts...)...)
	if err != nil {
		tb.Fatalf("dial %s: %v", target, err)
	}
	tb.Cleanup(func() { conn.Close() })
	return conn
}

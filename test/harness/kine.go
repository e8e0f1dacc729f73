package harness

import (
	"context"
	"os"
	"path/filepath"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Kine is what k3s uses instead of etcd: a part of etcd's API on an SQL database, here SQLite.
type Kine struct {
	*Process
	// Address is host:port, URL the same with its scheme.
	Address, URL string
	// Dir contains the database.
	Dir string
}

// StartKine starts kine with a new database, which must not contain a value under a rule.
func (e *Env) StartKine() *Kine {
	e.TB.Helper()
	k := &Kine{Address: FreeAddress(e.TB), Dir: filepath.Join(e.Dir, "kine")}
	k.URL = "http://" + k.Address
	if err := os.Mkdir(k.Dir, 0o700); err != nil {
		e.TB.Fatal(err)
	}
	e.addDataDir(k.Dir)
	// These are kine's defaults if no database is configured; without them, its watches miss
	// events.
	const parameters = "?_journal_mode=WAL&_busy_timeout=30000&_synchronous=NORMAL&_txlock=immediate&_stmt_cache_size=20&cache=shared"
	k.Process = e.spawn("kine", Bin(e.TB, "kine"), "--endpoint", "sqlite://"+filepath.Join(k.Dir, "state.db")+parameters, "--listen-address", "tcp://"+k.Address,
		"--metrics-bind-address", "0")
	e.TB.Cleanup(func() { k.Stop(10 * time.Second) })
	conn := Dial(e.TB, k.Address, nil)
	defer conn.Close()
	Eventually(e.TB, 30*time.Second, "kine to answer", func() error {
		if err := k.Alive(); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("/none")})
		return err
	})
	return k
}

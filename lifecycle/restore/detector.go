// Package restore notices that etcd was restored from a backup or emptied.
package restore

import (
	"context"
	"errors"
	"fmt"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrRestored says that etcd was restored from a backup, or emptied, while something was read or
// written that belongs together.
var ErrRestored = errors.New("etcd has older data than before, as after a restore")

// Position is where etcd's history is: revision and term of its log never go back within one
// cluster.
type Position struct {
	cluster        uint64
	term           uint64
	revision       int64
	clusterOf, set bool // set: there is a Position at all; clusterOf: it names the cluster
}

func (p Position) String() string { return fmt.Sprintf("revision %d, term %d", p.revision, p.term) }

// Detector notices that etcd comes back with older data than it had: another cluster ID, or a
// revision or term that is lower. It is safe for concurrent use.
//
// A member that lags behind has a lower revision, too. So only the answer to a linearizable read
// says where etcd is, and it is compared with what was known before the read began.
type Detector struct {
	mu   sync.Mutex
	last Position
}

// known is the latest Position that was seen.
func (t *Detector) Position() Position {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// saw notes an answer of etcd's.
func (t *Detector) Observe(h *pb.ResponseHeader) {
	if h == nil || h.Revision == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last.set = true
	t.last.revision, t.last.term = max(t.last.revision, h.Revision), max(t.last.term, h.RaftTerm)
	if h.ClusterId != 0 {
		t.last.cluster, t.last.clusterOf = h.ClusterId, true
	}
}

// compare compares the header of a linearizable answer with what was known before it was asked for.
// If etcd has gone back, that is where the Detector is from now on, and the answer is true.
func (t *Detector) Compare(before Position, h *pb.ResponseHeader) (restored bool) {
	restored = before.set && h != nil && (h.Revision < before.revision || h.RaftTerm < before.term || before.clusterOf && h.ClusterId != before.cluster)
	if restored {
		t.mu.Lock()
		t.last = Position{}
		t.mu.Unlock()
	}
	t.Observe(h)
	return restored
}

// check asks etcd where it is, by a read of key. restored says that it has gone back since the last
// answer that was seen.
func (t *Detector) Check(ctx context.Context, kv clientv3.KV, key string) (restored bool, before, now Position, err error) {
	before = t.Position()
	if key == "" {
		key = "\x00" // etcd has no empty key
	}
	r, err := kv.Get(ctx, key, clientv3.WithCountOnly())
	if err != nil {
		return false, before, Position{}, fmt.Errorf("read etcd's revision: %w", err)
	}
	restored = t.Compare(before, r.Header)
	return restored, before, t.Position(), nil
}

// Package restore detects that etcd was restored from a backup, or emptied.
package restore

import (
	"context"
	"errors"
	"fmt"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrRestored is returned if etcd was restored or emptied between reads or writes that belong
// together.
var ErrRestored = errors.New("etcd has older data than before, as after a restore")

// Position is a point in the history of an etcd cluster. Within one cluster, neither the revision
// nor the raft term ever decreases.
type Position struct {
	cluster        uint64
	term           uint64
	revision       int64
	clusterOf, set bool // set: there is a Position at all; clusterOf: it names the cluster
}

// String implements [fmt.Stringer].
func (p Position) String() string { return fmt.Sprintf("revision %d, term %d", p.revision, p.term) }

// Detector detects that etcd has older data than before: another cluster ID, or a lower revision or
// term. It is safe for concurrent use.
//
// A member that lags behind has a lower revision, too. Therefore only the response to a
// linearizable read is compared, with the position that was known before the read began.
type Detector struct {
	mu   sync.Mutex
	last Position
}

// Position returns the latest position that was observed.
func (t *Detector) Position() Position {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// Observe records the header of a response.
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

// Compare compares the header of a linearizable response with the position from before the request.
// If etcd was restored, it returns true, and the history begins again at the header.
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

// Check reads key to learn the position of etcd, and reports whether etcd was restored since the
// last response that was observed.
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

// Package etcdmodel is a test double of etcd 3.7: its KV service with revisions, history, leases
// that never expire, and the checks of its transactions, in memory. A test of test/differential
// holds it against a real etcd. It keeps nothing of compacted history from anyone but by the error,
// watches nothing, knows no users, and is no part of the product.
package etcdmodel

import (
	"maps"
	"slices"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Store is one etcd. It is safe for concurrent use.
type Store struct {
	maxOps int
	leases []int64

	mu             sync.Mutex
	rev, compacted int64
	keys           map[string][]version
}

// version is what became of a key at a revision.
type version struct {
	rev int64
	kv  *mvccpb.KeyValue // never changed; nil: it was deleted
}

// New makes an empty etcd, whose revision is 1. maxOps is etcd's --max-txn-ops.
func New(maxOps int, leases ...int64) *Store {
	return &Store{maxOps: maxOps, leases: leases, rev: 1, compacted: -1, keys: make(map[string][]version)}
}

// Clone makes another etcd that holds the same.
func (s *Store) Clone() *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &Store{maxOps: s.maxOps, leases: s.leases, rev: s.rev, compacted: s.compacted, keys: maps.Clone(s.keys)}
	for k, history := range c.keys {
		c.keys[k] = slices.Clone(history)
	}
	return c
}

// Rev returns the revision of the last write.
func (s *Store) Rev() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rev
}

// Do answers a request of the KV service as etcd does. Headers tell the revision alone. Errors are
// etcd's statuses. It retains nothing of the request.
func (s *Store) Do(request proto.Message) (proto.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := &writing{Store: s}
	switch r := request.(type) {
	case *pb.RangeRequest:
		return answered(w.rangeOnce(r))
	case *pb.PutRequest:
		return answered(w.putOnce(r))
	case *pb.DeleteRangeRequest:
		if len(r.GetKey()) == 0 {
			return nil, rpctypes.ErrGRPCEmptyKey
		}
		defer w.end()
		return w.deleteRange(r), nil
	case *pb.TxnRequest:
		return answered(w.txnOnce(r))
	case *pb.CompactionRequest:
		return answered(s.compact(r))
	}
	return nil, status.Error(codes.Unimplemented, "the model has no such method")
}

// answered keeps a nil answer of a type from being an answer.
func answered[M proto.Message](m M, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (s *Store) compact(r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	switch {
	case r.GetRevision() <= s.compacted:
		return nil, rpctypes.ErrGRPCCompacted
	case r.GetRevision() > s.rev:
		return nil, rpctypes.ErrGRPCFutureRev
	}
	s.compacted = r.GetRevision()
	return &pb.CompactionResponse{Header: &pb.ResponseHeader{Revision: s.rev}}, nil
}

// writing is a request under way. What it has written can be read at the next revision already.
type writing struct {
	*Store
	changed bool
}

func (w *writing) now() int64 {
	if w.changed {
		return w.rev + 1
	}
	return w.rev
}

func (w *writing) header() *pb.ResponseHeader { return &pb.ResponseHeader{Revision: w.now()} }

// end makes a new revision of what was written.
func (w *writing) end() { w.rev, w.changed = w.now(), false }

func (w *writing) set(key string, kv *mvccpb.KeyValue) {
	w.changed = true
	w.keys[key] = append(w.keys[key], version{w.rev + 1, kv})
}

// get returns nil if the key was not there at rev.
func (s *Store) get(key string, rev int64) *mvccpb.KeyValue {
	history := s.keys[key]
	for i := len(history) - 1; i >= 0; i-- {
		if history[i].rev <= rev {
			return history[i].kv
		}
	}
	return nil
}

// find returns copies of the pairs of a range at rev, by key.
func (s *Store) find(key, end []byte, rev int64) []*mvccpb.KeyValue {
	var found []*mvccpb.KeyValue
	for _, k := range slices.Sorted(maps.Keys(s.keys)) {
		if within(k, string(key), string(end)) {
			if kv := s.get(k, rev); kv != nil {
				c, _ := proto.Clone(kv).(*mvccpb.KeyValue)
				found = append(found, c)
			}
		}
	}
	return found
}

func within(k, key, end string) bool {
	switch end {
	case "":
		return k == key
	case "\x00":
		return k >= key
	}
	return k >= key && k < end
}

func (w *writing) putOnce(r *pb.PutRequest) (*pb.PutResponse, error) {
	if err := checkPut(r); err != nil {
		return nil, err
	}
	if err := w.checkPutNow(r); err != nil {
		return nil, err
	}
	answer := w.put(r)
	w.end()
	return answer, nil
}

// checkPutNow is about what is stored, and checkPut is not.
func (w *writing) checkPutNow(r *pb.PutRequest) error {
	if r.GetLease() != 0 && !slices.Contains(w.leases, r.GetLease()) {
		return rpctypes.ErrGRPCLeaseNotFound
	}
	if (r.GetIgnoreValue() || r.GetIgnoreLease()) && w.get(string(r.GetKey()), w.now()) == nil {
		return rpctypes.ErrGRPCKeyNotFound
	}
	return nil
}

func (w *writing) put(r *pb.PutRequest) *pb.PutResponse {
	key, next := string(r.GetKey()), w.rev+1
	before := w.get(key, w.now())
	kv := &mvccpb.KeyValue{Key: []byte(key), Value: slices.Clone(r.GetValue()), Lease: r.GetLease(), CreateRevision: next, ModRevision: next, Version: 1}
	if before != nil {
		kv.CreateRevision, kv.Version = before.GetCreateRevision(), before.GetVersion()+1
	}
	if r.GetIgnoreValue() {
		kv.Value = before.GetValue()
	}
	if r.GetIgnoreLease() {
		kv.Lease = before.GetLease()
	}
	w.set(key, kv)
	answer := &pb.PutResponse{Header: w.header()}
	if r.GetPrevKv() && before != nil {
		answer.PrevKv, _ = proto.Clone(before).(*mvccpb.KeyValue)
	}
	return answer
}

func (w *writing) deleteRange(r *pb.DeleteRangeRequest) *pb.DeleteRangeResponse {
	found := w.find(r.GetKey(), r.GetRangeEnd(), w.now())
	for _, kv := range found {
		w.set(string(kv.GetKey()), nil)
	}
	answer := &pb.DeleteRangeResponse{Header: w.header(), Deleted: int64(len(found))}
	if r.GetPrevKv() {
		answer.PrevKvs = found
	}
	return answer
}

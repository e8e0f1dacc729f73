package etcdmodel

import (
	"cmp"
	"maps"
	"slices"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"
)

// Grant adds a lease. It does not expire: see [Store.Revoke].
func (s *Store) Grant(id int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.leases, id) {
		return rpctypes.ErrGRPCDuplicateKey
	}
	s.leases = append(slices.Clone(s.leases), id)
	return nil
}

// Revoke ends a lease and deletes its keys at one revision.
func (s *Store) Revoke(id int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(s.leases, id) {
		return rpctypes.ErrGRPCLeaseNotFound
	}
	s.leases = slices.DeleteFunc(slices.Clone(s.leases), func(other int64) bool { return other == id })
	w := &writing{Store: s}
	for _, kv := range s.find([]byte{0}, []byte{0}, s.rev) {
		if kv.GetLease() == id {
			w.set(string(kv.GetKey()), nil)
		}
	}
	w.end()
	return nil
}

// Compacted returns the revision of the last compaction, -1 if there was none.
func (s *Store) Compacted() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.compacted
}

// Events returns what happened to the keys of a range from a revision on, in order, with the pair
// before each event, and the present revision. If from was compacted, the error is etcd's. A pair
// before an event is not given if the revision before the event was compacted.
func (s *Store) Events(key, end []byte, from int64) (events []*mvccpb.Event, now int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if from < s.compacted {
		return nil, s.rev, rpctypes.ErrGRPCCompacted
	}
	for k, history := range s.keys {
		if !within(k, string(key), string(end)) {
			continue
		}
		for i, v := range history {
			if v.rev < from {
				continue
			}
			e := &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(k), ModRevision: v.rev}}
			if v.kv != nil {
				e.Type, e.Kv = mvccpb.Event_PUT, clone(v.kv)
			}
			if i > 0 && history[i-1].kv != nil && v.rev-1 >= s.compacted {
				e.PrevKv = clone(history[i-1].kv)
			}
			events = append(events, e)
		}
	}
	slices.SortFunc(events, func(a, b *mvccpb.Event) int {
		return cmp.Or(cmp.Compare(a.GetKv().GetModRevision(), b.GetKv().GetModRevision()), slices.Compare(a.GetKv().GetKey(), b.GetKv().GetKey()))
	})
	return events, s.rev, nil
}

// Replaced is a value that was stored, and the revision that replaced or deleted it; 0 if none did.
type Replaced struct {
	*mvccpb.KeyValue
	By int64
}

// Values returns every value that was ever stored, compacted ones too.
func (s *Store) Values() (all []Replaced) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range slices.Sorted(maps.Keys(s.keys)) {
		for i, v := range s.keys[k] {
			if v.kv == nil {
				continue
			}
			r := Replaced{KeyValue: clone(v.kv)}
			if i+1 < len(s.keys[k]) {
				r.By = s.keys[k][i+1].rev
			}
			all = append(all, r)
		}
	}
	return all
}

func clone(kv *mvccpb.KeyValue) *mvccpb.KeyValue {
	c, _ := proto.Clone(kv).(*mvccpb.KeyValue)
	return c
}

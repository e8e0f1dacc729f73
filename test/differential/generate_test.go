package differential

import (
	"math/rand/v2"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
)

// keys are few, so that operations affect the same ones, and are on both sides of each end of a
// rule.
var keys = []string{
	"/s/a", "/s/b", "/s/c", "/s/", "/s", "/s0", "/s/p/x", "/s/p/y", "/s/p/", "/s/p", "/s/p0",
	"/t/a", "/t/b", "/t/", "/t0", "/u/1", "/u/2", "a", "\x00", "\x00\x00", "\xff", "\xff\xff", "/s/\x00\xff\n",
}

// generator generates random requests. The same seed generates the same requests if the servers
// respond in the same way.
type generator struct {
	*rand.Rand
	rules         ruleSet
	sealed, clear *canary.Set
	leases        []int64
}

func (g *generator) chance(percent int) bool { return g.IntN(100) < percent }

func (g *generator) key() string { return keys[g.IntN(len(keys))] }

// span returns a key and a range end: one key, a prefix, from a key to the end, all keys, or any
// two keys, perhaps in the wrong order.
func (g *generator) span() (key, end string) {
	switch g.IntN(10) {
	case 0, 1, 2, 3:
		return g.key(), ""
	case 4, 5:
		prefix := []string{"/s/", "/t/", "/", "/s/p/", "/u/", "/s", "\xff"}[g.IntN(7)]
		return prefix, prefixEnd(prefix)
	case 6:
		return g.key(), "\x00"
	case 7:
		return "\x00", "\x00"
	default:
		return g.key(), g.key()
	}
}

// value returns a value for a key. A value for a key under a rule contains the marker that etcd
// must never store.
func (g *generator) value(key string) []byte {
	set := g.clear
	if g.rules.sealed(key) {
		set = g.sealed
	}
	switch g.IntN(12) {
	case 0:
		return nil
	case 1:
		return []byte{}
	case 2:
		// A value that a client has encrypted itself, and one that looks like ours.
		return []byte("k8s:enc:" + []string{"kms:v2:local:", "kms:v2:other:", "aescbc:v1:k:", ""}[g.IntN(4)] + set.Value("layer"))
	case 3:
		return []byte(set.Value(strings.Repeat("long-", 1+g.IntN(800))))
	case 4:
		return []byte("\x00\xff" + set.Value("binary") + "\n\x80")
	case 5, 6:
		return []byte(set.Value(string(rune('a' + g.IntN(26)))))
	default:
		return []byte(set.Value("ab"[:1+g.IntN(2)])) // few, so that compares match
	}
}

// at returns a revision near the existing ones: mostly the current one, sometimes a past, compacted
// or future one.
func (g *generator) at(now int64) int64 {
	switch g.IntN(10) {
	case 0, 1, 2:
		return max(1, now-g.Int64N(15))
	case 3:
		return max(1, now-g.Int64N(200))
	case 4:
		return now + g.Int64N(3)
	default:
		return 0
	}
}

func (g *generator) lease() int64 {
	if len(g.leases) == 0 || g.chance(70) {
		return 0
	}
	if g.chance(5) {
		return 999 // was never granted
	}
	return g.leases[g.IntN(len(g.leases))]
}

func (g *generator) put() *pb.PutRequest {
	key := g.key()
	r := &pb.PutRequest{Key: []byte(key), Value: g.value(key), Lease: g.lease(), PrevKv: g.chance(40)}
	switch g.IntN(20) {
	case 0, 1:
		r.IgnoreValue, r.Value = true, nil
	case 2:
		r.IgnoreLease, r.Lease = true, 0
	case 3:
		r.IgnoreValue, r.IgnoreLease, r.Value, r.Lease = true, true, nil, 0
	case 4:
		r.IgnoreValue = g.chance(30) // refused if there is a value
	case 5:
		if g.chance(30) {
			r.Key = nil
		}
	}
	return r
}

func (g *generator) get(now int64) *pb.RangeRequest {
	key, end := g.span()
	r := &pb.RangeRequest{
		Key: []byte(key), RangeEnd: []byte(end), Revision: g.at(now), Serializable: g.chance(20),
		KeysOnly: g.chance(15), CountOnly: g.chance(10),
	}
	if g.chance(40) {
		r.Limit = g.Int64N(6)
	}
	if g.chance(40) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.IntN(5))
	}
	if g.chance(20) {
		bound := func() int64 {
			if g.chance(60) {
				return 0
			}
			return max(1, now-g.Int64N(20))
		}
		r.MinModRevision, r.MaxModRevision, r.MinCreateRevision, r.MaxCreateRevision = bound(), bound(), bound(), bound()
	}
	if g.chance(1) {
		r.Key, r.SortTarget = nil, pb.RangeRequest_KEY
	}
	if g.chance(1) {
		r.SortOrder = 7 // unknown to the server
	}
	return r
}

func (g *generator) deletion() *pb.DeleteRangeRequest {
	key, end := g.span()
	if g.chance(60) {
		end = ""
	}
	if g.chance(1) {
		key = ""
	}
	return &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end), PrevKv: g.chance(50)}
}

func (g *generator) compare(now int64) *pb.Compare {
	key, end := g.span()
	c := &pb.Compare{Key: []byte(key), RangeEnd: []byte(end), Result: pb.Compare_CompareResult(g.IntN(4))}
	revision := func() int64 {
		if g.chance(30) {
			return 0
		}
		return max(0, now-g.Int64N(15))
	}
	switch g.IntN(8) {
	case 0:
		c.Target, c.TargetUnion = pb.Compare_MOD, &pb.Compare_ModRevision{ModRevision: revision()}
	case 1:
		c.Target, c.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{CreateRevision: revision()}
	case 2:
		c.Target, c.TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: g.Int64N(3)}
	case 3:
		c.Target, c.TargetUnion = pb.Compare_LEASE, &pb.Compare_Lease{Lease: g.lease()}
	default:
		c.Target, c.TargetUnion = pb.Compare_VALUE, &pb.Compare_Value{Value: g.value(key)}
	}
	switch g.IntN(40) {
	case 0:
		c.TargetUnion = nil
	case 1: // an operand of another kind
		c.Target = pb.Compare_CompareTarget(g.IntN(6))
	case 2:
		c.Key = nil
	case 3:
		c.Result = 7 // unknown to the server
	}
	return c
}

func (g *generator) txn(now int64, depth int) *pb.TxnRequest {
	r := &pb.TxnRequest{}
	for range g.IntN(3) {
		r.Compare = append(r.Compare, g.compare(now))
	}
	r.Success, r.Failure = g.branch(now, depth), g.branch(now, depth)
	if g.chance(1) {
		// More than the limit of 128 operations.
		for i := range 130 {
			r.Success = append(r.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{
				RequestRange: &pb.RangeRequest{Key: []byte(keys[i%len(keys)])}}})
		}
	}
	return r
}

func (g *generator) branch(now int64, depth int) []*pb.RequestOp {
	var ops []*pb.RequestOp
	put := map[string]bool{}
	for range g.IntN(4) {
		switch n := g.IntN(10); {
		case n < 4:
			r := g.put()
			if put[string(r.Key)] && g.chance(90) {
				continue // a duplicate is refused; allow one sometimes
			}
			put[string(r.Key)] = true
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: r}})
		case n < 7:
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: g.get(now)}})
		case n < 8:
			r := g.deletion()
			if g.chance(80) {
				// otherwise it mostly conflicts with a put, and the whole transaction is refused
				r.RangeEnd = nil
			}
			if string(r.RangeEnd) == "\x00" {
				// etcd 3.5 to 3.7 does not notice that such a range conflicts with a put, and
				// panics if that put keeps the value or lease of the deleted key.
				r.RangeEnd = []byte("\xff\xff\xff")
			}
			if put[string(r.Key)] && g.chance(90) {
				continue
			}
			put[string(r.Key)] = true
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}})
		case depth < 3:
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: g.txn(now, depth+1)}})
		}
	}
	return ops
}

// next returns any request but a watch.
func (g *generator) next(now int64) any {
	switch n := g.IntN(100); {
	case n < 30:
		return g.put()
	case n < 48:
		return g.get(now)
	case n < 53:
		r := g.get(now)
		if g.chance(70) {
			r.SortOrder, r.SortTarget = 0, 0 // etcd streams only in the order of keys
		}
		return stream{r}
	case n < 60:
		return g.deletion()
	case n < 84:
		return g.txn(now, 0)
	case n < 87:
		return &pb.CompactionRequest{Revision: max(0, now-g.Int64N(20)+g.Int64N(3)), Physical: g.chance(15)}
	case n < 92:
		id := 1 + g.Int64N(5) // sometimes one that exists
		if g.chance(90) {
			g.leases = append(g.leases, id)
		}
		// No short TTL: two servers would not expire a lease at the same time.
		return &pb.LeaseGrantRequest{ID: id, TTL: []int64{3600, 7200, 86400, 9_000_000_001}[g.IntN(4)]}
	case n < 94:
		return &pb.LeaseRevokeRequest{ID: 1 + g.Int64N(6)}
	case n < 97:
		return &pb.LeaseTimeToLiveRequest{ID: 1 + g.Int64N(6), Keys: g.chance(70)}
	case n < 98:
		return &pb.LeaseKeepAliveRequest{ID: 1 + g.Int64N(6)}
	default:
		return &pb.LeaseLeasesRequest{}
	}
}
